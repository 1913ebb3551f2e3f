import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.transforms import Compose, RandGaussianNoise, RandGaussianNoised

from bundle.errors import InputError
from bundle.networks import save_weights
from bundle.training import RequireFiniteLoss, TrainingCheckpoints
from bundle.training.random_states import RandomStates, random_generators


def training(
    folder,
    epochs,
    steps=3,
    resume="",
    interval=2,
    about="t1",
    noise=None,
    scores=None,
    rate=None,
    model="best",
    init="",
):
    """A small training with every kind of randomness; returns it and the engines that run it."""
    torch.manual_seed(0)
    np.random.seed(0)
    scores = scores or iter(range(100, 0, -1))
    noise = noise or Compose([RandGaussianNoise(prob=0.9)]).set_random_state(0)
    network = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    if rate == "constant":
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    def step(engine, batch):
        optimizer.zero_grad()
        loss = network(noise(torch.rand(4, 3)) + float(np.random.rand())).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    trainer = Engine(step)
    trainer.state.max_epochs = epochs
    validator = SimpleNamespace(state=SimpleNamespace(best_metric=-1.0, best_metric_epoch=-1, epoch=0))
    validator.add_event_handler = lambda _, handler: setattr(validator, "done", handler)

    def validate(epoch):
        validator.state.epoch, score = epoch, next(scores)
        if validator.state.best_metric_epoch == -1 or score < validator.state.best_metric:
            validator.state.best_metric, validator.state.best_metric_epoch = score, epoch
        validator.done(validator)

    validator.run = validate
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: schedule.step())
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=interval), lambda e: validate(e.state.epoch))
    state = {"network": network, "optimizer": optimizer, "lr_scheduler": schedule, "trainer": trainer}
    checkpoints = TrainingCheckpoints(
        folder / "checkpoints",
        folder / "model.pt",
        state,
        validator,
        interval,
        noise,
        {"contrast": about},
        resume,
        model=model,
        init=init,
    )
    checkpoints.attach(trainer)
    trainer.run(range(steps), max_epochs=epochs)
    return network, validator, optimizer


def test_a_training_begins_with_the_weights_of_a_model(tmp_path):
    network, file = torch.nn.Linear(3, 1), str(tmp_path / "model.pt")
    torch.nn.init.constant_(network.weight, 10.0)
    save_weights(network, file)
    # one step of AdamW with a rate of 0.1 moves a weight by about that
    begun, _, _ = training(tmp_path / "begun", 1, steps=1, init=file)
    assert torch.allclose(begun.weight, network.weight, atol=0.3)
    # a training that goes on does not begin again
    on, _, _ = training(tmp_path / "begun", 1, steps=1, init=str(tmp_path / "gone.pt"), resume="auto")
    assert torch.equal(on.weight, begun.weight)
    with pytest.raises(InputError, match=r"nowhere\.pt"):
        training(tmp_path / "new", 1, init=str(tmp_path / "nowhere.pt"))


def names(folder):
    return sorted(f.name for f in (folder / "checkpoints").glob("*.pt"))


def test_a_resumed_training_ends_as_an_undisturbed_one(tmp_path):
    whole, best, _ = training(tmp_path / "whole", 9, scores=iter([5, 4, 6, 3, 7]))
    assert names(tmp_path / "whole") == [f"model_epoch={n}.pt" for n in (6, 8, 9)]  # the end is kept too
    training(tmp_path / "cut", 9, scores=iter([5, 4, 6, 3, 7]))
    for n in (8, 9):
        (tmp_path / f"cut/checkpoints/model_epoch={n}.pt").unlink()
    again, same_best, _ = training(tmp_path / "cut", 9, resume="auto", scores=iter([3, 7]))
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), atol=0, rtol=0)
    assert (best.state.best_metric, best.state.best_metric_epoch) == (3, 8)
    assert vars(same_best.state) == vars(best.state)
    assert (tmp_path / "cut/model.pt").read_bytes() == (tmp_path / "whole/model.pt").read_bytes()
    before = (tmp_path / "cut/model.pt").stat().st_mtime_ns
    training(tmp_path / "cut", 11, resume="auto", scores=iter([4, 4]))  # better than nothing, but not than before
    assert (tmp_path / "cut/model.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("model, kept", [("best", False), ("last", True)])
def test_the_model_is_the_best_or_the_last(tmp_path, model, kept):
    network, _, _ = training(tmp_path, 4, scores=iter([3, 7]), model=model)
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(weights[k], v) for k, v in network.state_dict().items()) == kept
    with pytest.raises(InputError, match="'first': use best or last"):
        training(tmp_path, 4, model="first")


def test_a_constant_learning_rate_goes_on(tmp_path):
    training(tmp_path, 4, rate="constant")
    _, _, optimizer = training(tmp_path, 6, resume="auto", rate="constant")
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_longer_training_gets_the_longer_schedule(tmp_path):
    training(tmp_path, 4)
    _, _, optimizer = training(tmp_path, 8, resume="auto")
    reference = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=8)
    for _ in range(8):
        reference.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"], abs=1e-9)


def test_a_damaged_checkpoint_is_skipped_or_refused(tmp_path, capsys):
    training(tmp_path, 4)
    newest = tmp_path / "checkpoints/model_epoch=4.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"epoch=4\.pt: cannot be read .* skipped"):
        training(tmp_path, 4, resume="auto")
    assert "model_epoch=2.pt: goes on after epoch 2" in capsys.readouterr().out
    newest.write_bytes(newest.read_bytes()[:1000])
    for resume, message in ((newest, "cannot be read"), ("gone.pt", "no such checkpoint")):
        with pytest.raises(InputError, match=message):
            training(tmp_path, 4, resume=resume)


@pytest.mark.parametrize("content", [{"network": {}}, [1], {"code": print}])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: (no checkpoint of such|cannot be read)"):
        training(tmp_path, 4, resume=tmp_path / "other.pt")


def test_other_trainings_are_kept_apart(tmp_path, capsys):
    training(tmp_path, 4)
    with pytest.raises(InputError, match=r"'contrast': 't1'.*'contrast': 't2'"):
        training(tmp_path, 4, resume="auto", about="t2")
    with pytest.raises(InputError, match="4 epochs already"):
        training(tmp_path, 3, resume="auto")
    with pytest.raises(InputError, match="other random transforms"):
        two = Compose([RandGaussianNoise(), RandGaussianNoise()]).set_random_state(0)
        training(tmp_path, 6, resume="auto", noise=two)
    old = [tmp_path / "model.pt", *sorted((tmp_path / "checkpoints").glob("*.pt"))]
    old = {f.name: f.read_bytes() for f in old}
    training(tmp_path, 2)
    assert names(tmp_path) == ["model_epoch=2.pt"]
    assert {f.name: f.read_bytes() for f in (tmp_path / "checkpoints/earlier_1").iterdir()} == old
    assert (tmp_path / "model.pt").read_bytes() != old["model.pt"]
    assert "earlier_1: 2 checkpoints and a copy of the model of an earlier training" in capsys.readouterr().out


def test_random_states_go_back_to_where_they_were():
    transforms = Compose([RandGaussianNoised("a"), [{"b": RandGaussianNoise()}]]).set_random_state(3)
    assert len(random_generators(transforms)) >= 3
    states = RandomStates(transforms)

    def draw():
        numbers = [g.rand() for g in random_generators(transforms)]
        return [*numbers, np.random.normal(), torch.rand(1).item(), random.random()]

    draw()
    saved = states.state_dict()
    first = draw()
    draw()
    states.load_state_dict(saved)
    assert draw() == first


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_broken_loss_stops_the_training_and_names_the_scans(loss):
    trainer = Engine(lambda engine, batch: [{"loss": loss if engine.state.iteration == 2 else 1.0}])
    RequireFiniteLoss("models/checkpoints").attach(trainer)
    with pytest.raises(InputError, match=r"step 2 \(epoch 1\), with ann, bob in.*models/checkpoints"):
        trainer.run([{"name": ["eve"]}, {"name": ["bob", "ann", "bob"]}], max_epochs=1)
