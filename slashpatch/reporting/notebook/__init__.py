"""What results show in notebooks: small tables and inline SVG, without scripts."""
