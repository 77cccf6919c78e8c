"""The anchor: noised statistics sent once, from which everything else is post-processing (privacy.md, section 5).

What both sides must agree on. Message one is a table of every column's levels (`marginals`), message two the second
moments of clipped rows (`moments`), encoded with what came out of message one (`features`).
"""
