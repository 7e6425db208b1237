# Peer, from scratch, on the sample set.
_base_ = "_base_/aerial_cars.py"
