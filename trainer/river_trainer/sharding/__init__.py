"""One trainer in several processes, which `torchrun` starts: the model is divided among them, and so is the data.

    rank 0  journal ─▶ Service ─▶ Executor ─▶ ShardedPasses ──batch, weights──▶ ShardedPasses  ranks 1, 2, …
                          ▲                        │  ◀── all-gathers of FSDP, rows of experts ──▶  │
                          └── optimizer, effects ◀─┴────────── outputs, gradients ──────────────────┘

Rank 0 is the trainer as everybody else knows it: queue, runs, optimizer, disk, effects. The others own nothing but
their part of the frozen model; they take their share of every batch of jobs and forget it. So there is no state that
could drift apart, and what a run weighs it weighs once.

* Frozen dense weights are sharded by FSDP2, layer by layer: gathered before a layer runs, forward and backward.
* The experts of every layer are divided: `river_kernels.expert_parallel`.
* An adapter's weights go to every process with the batch. Its gradient comes back as one sum in float32 a strand, in
  which every element is zero in all processes but one: the order of the sum does not matter, and the result has the
  bits that one process with as many lanes gets.
* All processes run the same passes at the same time, one each; who has no data for one runs it on a filler token.

If a process dies or falls out of step, the others notice by its closed connection, or after `limits.GROUP_TIMEOUT_S`,
and end with 1; `torchrun` ends, or restarts, all of them, and the journal is replayed. On CPUs they talk through gloo;
on GPUs through NCCL, where this has not been run.
"""
