"""`piflux bench`: milliseconds a step, beside peers."""
