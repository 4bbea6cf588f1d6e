"""Frozen encoders behind the interfaces of public benchmarks; each file is one of them.

    hear.py     HEAR 2021: a module with load_model, get_timestamp_embeddings, get_scene_embeddings
    xares.py    X-ARES: an encoder class
    mteb.py     MTEB 2.8 and later, its audio tasks: an encoder with its metadata

`CRAFT_CHECKPOINT` names the weights where the interface has no place for them: what launchers/probe.py takes.
`columns.py` is what they share: recordings of any length -> vectors over time.
"""
