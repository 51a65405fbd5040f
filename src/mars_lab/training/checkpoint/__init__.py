"""Checkpoints that exist whole or not at all, saved on any number of processes and loaded on any other.

`folder` knows the files, `contents` what is in them, `saver` writes them beside the training, `loader` finds and reads
the newest good one, `plain` is the bridge to `torch.save`.
"""
