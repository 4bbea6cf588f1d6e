"""A run as a directory that `transformers` loads by itself: weights, settings, code, model card.

configuration.py       CraftConfig             } what `AutoModel` and its relatives find there, written against our own
modeling.py            CraftModel, ...         } modules; nothing else here imports them or transformers
feature_extraction.py  CraftFeatureExtractor   }
bundle.py              such a module and all that it uses of ours -> one file that needs torch and transformers alone
card.py                README.md
directory.py           the directory, whole or not at all
"""
