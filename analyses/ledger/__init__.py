"""The ledger of the paper on trial: every claim, what it was measured by, and the verdict that a stated rule gives.

`verdicts` holds what a claim, its evidence and its verdict are; `theory` and `training` hold the claims; `rows` judges
them on a tree of result folders; `runs` says which runs make that tree; `report` and `page` write it all down.
"""
