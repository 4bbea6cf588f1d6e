"""What a frozen encoder's tokens are worth without finetuning.

In: any weights and labelled shards. Out: features on disk, probes trained on them, scores with intervals.

    frozen.py     any weights -> an encoder that gives the tokens of each block, and their pooling
    features.py   shards -> files of features: a rank's share each, finished ones kept
    probes.py     features -> a trained probe: linear, attentive, CGP, kNN
    protocol.py   which clips train, choose and test; means, spreads, intervals
    curve.py      the same of a model in training, at its evaluations
"""
