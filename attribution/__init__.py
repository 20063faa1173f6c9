"""Which admitted sources, policies and authorities shaped an output: asked of the log, not of the corpus.

``log`` says what the log proves about a campaign; ``weights`` opens models, accumulators and factors and holds them to
their commitments; ``factors`` and ``query`` turn an output into a direction in parameter space; ``trace`` ranks.
Imports ``consensus`` alone: nodes and jobs are met in files.
"""
