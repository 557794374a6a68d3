"""Benchmarks of DSE against the implementations a user could take instead."""
