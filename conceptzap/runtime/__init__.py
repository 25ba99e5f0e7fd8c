"""Where edits meet the activations: hooks, gates, ops, the books of every UNet call, the sampler.

`attach` hooks edits into a UNet. At every call the `Ledger` of `receipt` asks the `gates` how strongly
each edit acts on each row, the `hooks` at the edits' modules let the `ops` compute what the acting ones
add, and the books are closed: every module must have seen every row, or the call raises.

Edits of the text encoders (`texts`) have books of their own, one for each encoder; a UNet call is refused
whose text states these have not made.

gates: (text states [rows, length, width], timesteps [rows]) -> strengths [edits, rows], or [rows, length]
    for an edit behind a `token` gate. All-zero states are shut. Text is read once, time at every call.
ops:   (input x [rows, ..., in], output y, strengths) -> what to add to x (`into down`) or to y. Every
    edit starts from the base's own x, y and W; low-rank pairs are summed along the rank, masks multiply.
    A row of strength 0 gets nothing added, whatever the product would have been.
"""
