"""Parts of a verification: what is on disk, numbers decoded twice, and the distance from a reference."""
