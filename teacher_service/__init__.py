"""A logprob service: token ids in, the teacher's distribution at the response positions out."""
