"""``make demo``: a first run, on pairs that the package ships."""
