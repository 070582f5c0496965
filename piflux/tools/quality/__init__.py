"""`piflux quality`: how far pictures drift from one rank's."""
