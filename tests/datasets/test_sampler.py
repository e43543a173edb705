import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from datasets.sampler import TrainBatches
from util.errors import UserError


@settings(deadline=None)
@given(
    size=st.integers(1, 60),
    batch=st.integers(1, 5),
    world=st.integers(1, 3),
    accum=st.integers(1, 3),
    epochs=st.integers(1, 3),
    data=st.data(),
)
def test_goes_on_anywhere_as_if_never_stopped(size, batch, world, accum, epochs, data):
    options = dict(batch_size=batch, world_size=world, rank=data.draw(st.integers(0, world - 1)), seed=3, epochs=epochs)
    if size // world // batch // accum == 0:
        with pytest.raises(UserError, match="larger than the data set"):
            TrainBatches(size, accum_iter=accum, **options)
        return
    whole = TrainBatches(size, accum_iter=accum, **options)
    batches = list(whole)
    assert len(batches) == epochs * whole.steps_per_epoch
    assert whole.steps_per_epoch % accum == 0
    epoch, step = data.draw(st.integers(0, epochs - 1)), data.draw(st.integers(0, whole.steps_per_epoch))
    rest = TrainBatches(size, accum_iter=accum, start_epoch=epoch, start_step=step, **options)
    done = epoch * whole.steps_per_epoch + step
    assert list(rest) == batches[done:]
    epochs_of = [epoch for keys in batches for epoch, _ in keys]
    assert epochs_of == [epoch for epoch in range(epochs) for _ in range(whole.steps_per_epoch * batch)]


def test_order_is_that_of_the_distributed_sampler():
    ours = TrainBatches(25, 4, world_size=2, rank=1, seed=7, epochs=2)
    theirs = DistributedSampler(range(25), num_replicas=2, rank=1, seed=7, drop_last=True)
    for epoch in range(2):
        theirs.set_epoch(epoch)
        assert [index for batch in ours.batches(epoch) for index in batch] == list(theirs)
    assert ours.batch(0, 0) != ours.batch(1, 0)


def test_two_ranks_see_what_one_rank_sees_with_twice_the_batch():
    one, *two = (TrainBatches(40, 8 // n, seed=1, epochs=2, world_size=n, rank=r) for n, r in ((1, 0), (2, 0), (2, 1)))
    assert all(sorted(whole) == sorted([*parts[0], *parts[1]]) for whole, *parts in zip(one, *two, strict=True))
