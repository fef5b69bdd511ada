"""Charts of scans, explanations and effects in Vega-Lite, made with Altair.

Each function takes rows, as a DataFrame or as the name of a data set that a page fills in later,
and returns a chart. A chart computes nothing in Python from its rows, so its specification is the
same for all data. Colours come from the configuration `palette.theme`, which the caller applies.
"""
