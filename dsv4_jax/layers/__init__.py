"""The layers of a block, one file each. These letters and words mean the same in all of them, and in `model.py`.

Shapes, with the field of the configuration that gives the size:

    B  rows of a batch                  H   query heads, num_attention_heads
    S  tokens of a row                  K   width of a head and of an entry, head_dim
    N  tokens of all rows, B x S        R   its rotary dimensions, qk_rope_head_dim
    D  hidden_size                      rq  rank of the queries, q_lora_rank
    n  residual streams, hc_mult        Hi  heads of the indexer, index_n_heads
    V  vocab_size                       di  their width, index_head_dim
    L  blocks, num_hidden_layers        W   tokens of a window, sliding_window
    E  routed experts                   m   tokens of a compressed entry, compress_ratios
    I  width of an expert               T   compressed entries of a row
    k  how many are chosen: entries (index_topk) or experts (num_experts_per_tok)

In `norm.py` I and O are any matrix's inputs and outputs; in `experts.py` and `kv_cache.py` R counts rows;
`baseline_attention.py` has letters of its own.

Words:

    entry      one vector [K] that stands for m tokens; attention reads it in place of their keys and values
    tail       what a compressor remembers of tokens whose block is not full yet, so that later tokens can fill it
    head read  the weighted sum that makes one vector [D] of a token's n streams, before the output matrix (`HyperHead`)
    record     what a block reports beside its result, as a dictionary: load of the experts, losses, choices
    unit       the blocks, in order, that a layer plan repeats; each is traced and compiled once (`layer_plan.py`)
    segment    a unit and how often it comes; the parameters of its repeats are stacked and scanned over
"""
