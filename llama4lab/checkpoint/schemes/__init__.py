"""Schemes: what stored integers and small floats mean as numbers. One family a file; matrices are [out, in]."""
