"""`python -m teacher_service check`: what an operator runs first against a teacher."""
