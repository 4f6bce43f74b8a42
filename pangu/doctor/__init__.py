"""`pangu doctor`: what a machine has, whether it computes what it should, and how fast it is."""
