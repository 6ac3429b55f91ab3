"""The server: decodes images, runs exported encoders, and answers with embeddings, attention and neighbors.

Never imports torch, `patchsight_train` or `patchsight_export`. Those two may import the leaves
`manifest`, `decode`, `dataset`, `config` and `errors`, and nothing else from here.
"""

__version__ = "0.1.0"
