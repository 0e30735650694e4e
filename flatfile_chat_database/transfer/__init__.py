"""Moving whole stores: every way is to copy by the map, and to verify."""
