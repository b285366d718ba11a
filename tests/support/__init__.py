"""What tests share: builders of tiny real models."""
