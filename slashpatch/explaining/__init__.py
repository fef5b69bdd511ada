"""Why a head is a slash head."""
