"""Checks requirements/teacher-gpu.lock and trainer-gpu.lock on a machine without a GPU; installs nothing."""
