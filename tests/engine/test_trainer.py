import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_uns.engine.trainer import Trainer, _split
from fastreid_uns.hook import HookBase
from fastreid_uns.structures import Batch


class Linear(nn.Module):
    """A model of one layer whose labels are the first two pixels' order."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 2)

    def forward(self, batch):
        logits = self.layer(batch.views[0].flatten(1))
        return {
            "loss_a": F.cross_entropy(logits, batch.labels),
            "loss_b": logits.square().mean(),
            "size": logits.norm(),
        }


class FixedLoader:
    def __init__(self, steps: int = 3, poison: int | None = None):
        self.steps, self.poison = steps, poison

    def epoch(self, epoch):
        generator = torch.Generator().manual_seed(epoch)
        for step in range(self.steps):
            images = torch.rand(8, 3, 2, 2, generator=generator)
            if self.poison == epoch * self.steps + step:
                images = images * torch.nan
            labels = (images[:, 0, 0, 0] > images[:, 0, 0, 1]).long()
            none = torch.zeros(8, dtype=torch.long)
            yield Batch((images,), torch.arange(8), labels, none, none)


class Recorder(HookBase):
    def __init__(self, order: int, seen: list, name: str):
        self.order, self.seen, self.name = order, seen, name

    def before_train(self):
        self.seen.append((self.name, "before_train"))

    def after_epoch(self):
        self.seen.append((self.name, "after_epoch", self.trainer.epoch, self.trainer.iter))

    def after_train(self):
        self.seen.append((self.name, "after_train"))


def make(loader=None, epochs=2, **kwargs) -> Trainer:
    torch.manual_seed(0)
    model = Linear()
    loader = loader or FixedLoader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, loader, optimizer, epochs=epochs, iters_per_epoch=loader.steps, **kwargs)


def test_hooks_run_by_order_and_within_it_as_they_were_added():
    seen: list = []
    hooks = [Recorder(50, seen, "late"), Recorder(10, seen, "early"), Recorder(50, seen, "later")]
    make(epochs=1, hooks=hooks).train()
    assert [entry[0] for entry in seen if entry[1] == "after_epoch"] == ["early", "late", "later"]
    assert seen[0] == ("early", "before_train")
    assert seen[-1] == ("later", "after_train")


class MomentHook(HookBase):
    """Notes what the model is told."""

    def __init__(self):
        self.seen: list = []

    def before_epoch(self):
        self.seen.append(("epoch", *self.trainer.model.moment))

    def before_step(self):
        self.seen.append(("step", *self.trainer.model.moment))


def test_the_model_is_told_the_moment_before_each_clustering_and_each_step():
    hook = MomentHook()
    make(FixedLoader(steps=2), epochs=2, hooks=[hook]).train()
    assert hook.seen == [
        ("epoch", 0, 0, 0.0),
        ("step", 0, 0, 0.0),
        ("step", 0, 1, 0.25),
        ("epoch", 1, 2, 0.5),
        ("step", 1, 2, 0.5),
        ("step", 1, 3, 0.75),
    ]


def test_epochs_of_different_lengths_share_the_run_evenly():
    class Growing(FixedLoader):
        def __len__(self):
            return self.steps

        def epoch(self, epoch):
            yield from super().epoch(epoch)
            self.steps = 4

    hook, trainer = MomentHook(), make(FixedLoader(1))
    trainer.train_loader, trainer.iters_per_epoch = Growing(steps=2), 0
    trainer.add_hook(hook)
    trainer.train()
    steps = [(entry[2], entry[3]) for entry in hook.seen if entry[0] == "step"]
    assert steps == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.625), (4, 0.75), (5, 0.875)]


def test_two_hooks_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two hooks are named twin"):
        make(hooks=[Recorder(1, [], "twin"), Recorder(2, [], "twin")])


def test_keys_that_begin_with_loss_are_summed_and_the_rest_is_only_kept():
    trainer = make()
    batch = next(trainer.train_loader.epoch(0))
    trainer.step(batch)
    last = trainer.last
    torch.testing.assert_close(last["loss"], last["loss_a"] + last["loss_b"])
    assert "size" in last


def test_one_step_equals_plain_gradient_descent():
    trainer = make()
    batch = next(trainer.train_loader.epoch(0))
    twin = Linear()
    twin.load_state_dict(trainer.model.state_dict())
    outputs = twin(batch)
    (outputs["loss_a"] + outputs["loss_b"]).backward()
    expected = twin.layer.weight - 0.1 * twin.layer.weight.grad
    trainer.step(batch)
    torch.testing.assert_close(trainer.model.layer.weight, expected)


def test_accumulation_over_parts_equals_the_whole_batch():
    whole, parts = make(), make(accumulate=4)
    batch = next(whole.train_loader.epoch(0))
    whole.step(batch)
    parts.step(batch)
    torch.testing.assert_close(parts.model.layer.weight, whole.model.layer.weight)


def test_accumulation_that_does_not_divide_the_batch():
    trainer = make(accumulate=3)
    with pytest.raises(ValueError, match=r"SOLVER\.ACCUMULATE 3 does not divide the 8 images"):
        trainer.step(next(trainer.train_loader.epoch(0)))


def test_clipping_bounds_the_step():
    trainer = make(clip=1e-3)
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.step(next(trainer.train_loader.epoch(0)))
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_and_keeps_float32_weights(amp):
    trainer = make(epochs=20, amp=amp)
    first = float(trainer.model(next(trainer.train_loader.epoch(0)))["loss_a"])
    trainer.train()
    assert float(trainer.last["loss_a"]) < first
    assert trainer.model.layer.weight.dtype == torch.float32


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved_and_hooks_still_close():
    seen: list = []
    trainer = make(FixedLoader(poison=4), hooks=[Recorder(60, seen, "save")])
    with pytest.raises(RuntimeError, match=r"not finite since step 4 \(epoch 1; now loss nan.*SOLVER\.BASE_LR"):
        trainer.train()
    assert [entry[1] for entry in seen] == ["before_train", "after_epoch", "after_train"]


def test_a_model_without_loss_is_named():
    trainer = make()
    trainer.model.forward = lambda batch: {"size": batch.views[0].sum()}
    with pytest.raises(RuntimeError, match=r"Linear\.forward returned size; at least one key must begin with 'loss'"):
        trainer.step(next(trainer.train_loader.epoch(0)))


def test_stop_ends_the_run_after_the_epoch_with_all_hooks_done():
    class Stopper(HookBase):
        order = 15

        def before_epoch(self):
            if self.trainer.epoch == 1:
                self.trainer.stop("enough")

    seen: list = []
    trainer = make(epochs=9, hooks=[Stopper(), Recorder(60, seen, "save")])
    trainer.train()
    assert trainer.epochs_done == 2
    assert [entry[2] for entry in seen if entry[1] == "after_epoch"] == [0, 1]


def test_state_of_a_stopped_run_continues_to_the_same_weights():
    straight = make(epochs=3)
    straight.train()
    first = make(epochs=1)
    first.train()
    second = make(epochs=3)
    second.load_state_dict(first.state_dict())
    second.train()
    assert torch.equal(second.model.layer.weight, straight.model.layer.weight)
    assert second.iter == straight.iter == 9


def test_a_batch_in_parts_logs_the_mean_over_the_parts():
    trainer = make(accumulate=4)
    batch = next(trainer.train_loader.epoch(0))
    with torch.no_grad():
        parts = [trainer.model(batch.rows(slice(first, first + 2))) for first in range(0, 8, 2)]
    trainer.step(batch)
    for name in ("loss_a", "loss_b", "size"):
        assert float(trainer.last[name]) == pytest.approx(sum(float(part[name]) for part in parts) / 4, rel=1e-6)
    assert float(trainer.last["loss"]) == pytest.approx(
        float(trainer.last["loss_a"] + trainer.last["loss_b"]), rel=1e-6
    )


def test_a_part_that_is_not_finite_is_noticed_whichever_it_is():
    trainer = make(accumulate=4)
    batch = next(trainer.train_loader.epoch(0))
    batch.views[0][0] = torch.nan
    trainer.step(batch)
    with pytest.raises(RuntimeError, match="not finite since step 0"):
        trainer.check_finite()


def test_each_part_of_a_joint_batch_holds_its_share_of_every_domain():
    """Four source images, then two unlabelled ones."""
    number = torch.arange(6)
    batch = Batch((number.float().view(6, 1, 1, 1),), number, number * 10, number, torch.tensor([1, 1, 1, 1, 0, 0]))
    parts = _split(batch, 2)
    assert [part.index.tolist() for part in parts] == [[0, 1, 4], [2, 3, 5]]
    for part in parts:
        assert part.labels.tolist() == [10 * i for i in part.index.tolist()]
        assert part.views[0].flatten().tolist() == part.index.tolist()
        assert part.domains.tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match=r"ACCUMULATE 4 does not divide the 2 images of domain 0 of a process"):
        _split(batch, 4)
