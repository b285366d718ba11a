"""The contract between teacher and trainer: messages, their numpy forms, and the codec between the two."""
