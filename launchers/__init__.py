"""The commands: each a script for `deepspeed` and `python`, a module, and a subcommand of `craft`."""
