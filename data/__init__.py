"""Images, from where they lie to batches on the device, and the rotation pretext task.

In the order in which an image passes through: `sources` (with `drawn`, `folder_source` and
`parquet_source`) finds it, `prepare` decodes it once (`decode`, `decoding_pool`, `transforms`;
`shards`, or `jpeg` and `jpeg_shards`; `manifest`; `disk_space` asks first), `prepared` maps it into
memory, `splits` says what it is for, `loaders` puts it into a batch, `rotation` turns it. What the
lower blocks of a network made of it may be kept as `tokens`, which `loaders` batches likewise.
`randomness` decides by chance, without state; `canary` proves that nothing on the way tells which
way up an image was.
"""
