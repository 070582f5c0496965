"""Policies and schedules: which part a rank computes, and what attention reads."""
