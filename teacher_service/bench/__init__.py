"""`python -m teacher_service bench`: measures a running teacher from outside."""
