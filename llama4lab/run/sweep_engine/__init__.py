"""The engine of sweeps: all cells of a sweep in one packed pass, each from where it begins to differ."""
