"""Measurements, one module a scenario; `python -m benchmarks` runs them. Tests run them too, without timing."""
