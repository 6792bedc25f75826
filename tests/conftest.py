"""Owns how generated inputs are tried everywhere: how long one takes says something of the machine, not of the code."""

from hypothesis import HealthCheck, settings

settings.register_profile("baton", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("baton")
