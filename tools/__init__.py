"""Programs that check this project; no part of what is installed."""
