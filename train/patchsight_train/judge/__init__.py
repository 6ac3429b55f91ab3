"""How good is a finished encoder? The pieces of `patchsight-eval`: what its embeddings get right, what they are like,
and how much they bear; each piece is functions of its own."""
