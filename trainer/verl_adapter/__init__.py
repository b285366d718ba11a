"""The only place that knows verl and Ray."""
