"""`PrivacyEngine`: scripts written for Opacus, and what it refuses."""

import collections
import importlib
import inspect
import textwrap
import warnings

import pytest
import torch
import torch.nn.functional as F
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from psgrad import ConfigError, RefusedModelError
from psgrad.clipping import AdaptiveQuantile, Automatic
from psgrad.dp import PrivacyEngine, noise_generator
from recipes.data import load_images
from tests.dp.problems import flat, loader_of, network, sgd, train

SCRIPT = textwrap.dedent(
    """
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    from opacus.utils.batch_memory_manager import BatchMemoryManager
    from {library} import PrivacyEngine

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    ).double()
    optimizer = {optimizer}
    loader = DataLoader(TensorDataset(x, y), batch_size=20, generator=torch.Generator().manual_seed(1))
    criterion = nn.CrossEntropyLoss({reduction})
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        criterion=criterion,
        noise_multiplier=0.0,
        {clipping},
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    sizes = []
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size={physical}, optimizer=optimizer
    ) as batches:
        for epoch in range(2):
            for data, label in batches:
                optimizer.zero_grad()
                loss = criterion(model(data), label)
                loss.backward()
                optimizer.step()
                sizes.append(len(data))
            schedule.step()
    """
)
OPTIMIZERS = {
    "sgd": "torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)",
    "adam": (
        "torch.optim.Adam([{'params': model[0].parameters(), 'lr': 1e-2}, {'params': model[1].parameters()},"
        " {'params': model[4].parameters()}], lr=1e-3)"
    ),
}
FLAT = "max_grad_norm=0.3"
PER_LAYER = "max_grad_norm=[0.3, 0.2, 0.1, 0.1, 0.3, 0.2], clipping='per_layer'"


def run(library: str, images: dict, **parts) -> tuple[torch.Tensor, list]:
    names = dict(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus's own
        exec(compile(SCRIPT.format(library=library, **parts), library, "exec"), names)
    weights = torch.cat([p.detach().flatten() for p in names["model"].parameters()])
    return weights, [names["sizes"], names["engine"].accountant.history]


@pytest.fixture(scope="module")
def images() -> dict:
    data = load_images("mnist5k", None, download=False)
    return {"x": data.train_x[:120].double(), "y": data.train_y[:120]}


@pytest.mark.parametrize(
    "parts",
    [
        {"optimizer": "sgd", "clipping": FLAT, "physical": 100, "reduction": ""},
        {"optimizer": "adam", "clipping": FLAT, "physical": 7, "reduction": ""},
        {"optimizer": "sgd", "clipping": PER_LAYER, "physical": 7, "reduction": ""},
        {
            "optimizer": "sgd",
            "clipping": FLAT + ", loss_reduction='sum'",
            "physical": 7,
            "reduction": "reduction='sum'",
        },
    ],
    ids=["flat", "accumulated", "per layer", "sum"],
)
def test_a_script_written_for_opacus_changes_one_import(images, parts):
    parts = parts | {"optimizer": OPTIMIZERS[parts["optimizer"]]}
    theirs, seen = run("opacus", images, **parts)
    ours, seen_too = run("psgrad.dp", images, **parts)
    assert seen_too == seen  # the same batches, the same accounting
    # Opacus's factors are C / (norm + 1e-6): that much shorter
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def small(batch: int = 4, count: int = 16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = TensorDataset(torch.randn(count, 3), torch.randint(2, (count,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=batch)


def private(engine=None, **options):
    model, optimizer, loader = small()
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0} | options
    return (engine or PrivacyEngine()).make_private(
        module=model, optimizer=optimizer, data_loader=loader, **options
    )


def train_one(model, optimizer, rows: int) -> None:
    F.cross_entropy(model(torch.randn(rows, 3)), torch.zeros(rows, dtype=torch.long)).backward()
    optimizer.step()


def test_the_mean_over_a_physical_batch_is_undone_and_the_divisor_is_constant():
    for rows in (2, 4, 9):
        model, optimizer, _ = private(noise_multiplier=0.0, max_grad_norm=1e-3)
        before = model[2].bias.detach().clone()
        x = torch.randn(1, 3).expand(rows, 3)
        F.cross_entropy(model(x), torch.zeros(rows, dtype=torch.long)).backward()
        clipped = model[2].bias.grad.clone()  # the sum: every row's is the same
        optimizer.step()
        torch.testing.assert_close(before - model[2].bias.detach(), 0.1 * clipped / 4)
        assert torch.cat([clipped / rows]).norm() <= 1e-3


def test_an_empty_batch_is_a_step_of_noise():
    model, optimizer, _ = private()
    train_one(model, optimizer, 0)
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.accountant.history == [(1.0, 0.25, 1)]


def test_the_noise_is_scaled_to_the_style_s_bound():
    for norm, clipping, bound in ((2.0, None, 2.0), ([3.0, 1.0, 1.0, 1.0], "per_layer", 12**0.5)):
        spread = []
        for seed in range(200):
            model, optimizer, _ = private(
                max_grad_norm=norm, clipping=clipping, noise_generator=noise_generator(seed=seed)
            )
            before = [p.detach().clone() for p in model.parameters()]
            train_one(model, optimizer, 0)
            spread += [(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
        assert torch.cat(spread).std().item() == pytest.approx(0.1 * bound / 4, rel=0.05)


@pytest.mark.parametrize("door", ["make_private", "make_private_with_epsilon"])
def test_a_memory_budget_changes_the_memory_and_nothing_else(door):
    moved = []
    for budget in (None, 1):
        torch.manual_seed(0)
        model = network().double()
        noise = {"noise_multiplier": 1.0}
        if door != "make_private":
            noise = {"target_epsilon": 3.0, "target_delta": 1e-2, "epochs": 2}
        model, optimizer, loader = getattr(PrivacyEngine(), door)(
            module=model,
            optimizer=sgd(model.parameters()),
            data_loader=loader_of(),
            max_grad_norm=0.1,
            noise_generator=noise_generator(seed=3),
            memory_budget=budget,
            **noise,
        )
        train(model, optimizer, ((x.double(), y) for x, y in loader))
        moved.append(flat(model))
    assert (moved[0] - flat(network().double())).norm() > 0.01
    torch.testing.assert_close(moved[1], moved[0])


def test_schedulers_of_opacus_drive_noise_and_norm():
    _, optimizer, _ = private()
    noise = ExponentialNoise(optimizer, gamma=0.5)
    clip = ExponentialGradClip(optimizer, gamma=0.1)
    noise.step()
    clip.step()
    assert optimizer.noise_multiplier == 0.5
    assert optimizer.max_grad_norm == pytest.approx(0.1)
    assert optimizer.clip.l2_bound == pytest.approx(0.1)


def test_the_bound_stays_within_a_logical_step():
    model, optimizer, _ = private()
    model(torch.randn(3, 3)).mean().backward()
    with pytest.raises(ConfigError, match="between logical steps"):
        optimizer.max_grad_norm = 2.0


@pytest.mark.parametrize(
    "style", [Automatic(1.0), AdaptiveQuantile(1.0, expected_batch_size=4, count_noise=5.0)]
)
def test_a_style_with_its_settings_is_a_norm(style):
    model, optimizer, _ = private(max_grad_norm=style, noise_multiplier=2.0)
    train_one(model, optimizer, 4)
    assert optimizer.accountant.history == [(2.0, 0.25, 1)]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_target_epsilon_is_kept(accountant):
    model, optimizer, loader = small(batch=4, count=64)
    engine = PrivacyEngine(accountant=accountant)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=3.0,
        target_delta=1e-3,
        epochs=2,
        max_grad_norm=1.0,
    )
    assert engine.get_epsilon(1e-3) == 0
    for _ in range(2):
        for x, _y in loader:
            train_one(model, optimizer, len(x))
    assert 2.5 < engine.get_epsilon(1e-3) <= 3.0
    assert engine.get_epsilon(1e-3) == engine.get_epsilon(1e-3)


def test_a_checkpoint_brings_back_model_optimizer_and_spent_privacy(tmp_path):
    engine = PrivacyEngine()
    model, optimizer, _ = private(engine)
    for _ in range(3):
        train_one(model, optimizer, 4)
    engine.save_checkpoint(path=tmp_path / "c.pt", module=model, optimizer=optimizer)
    resumed = PrivacyEngine()
    other, again, _ = private(resumed)
    with pytest.raises(ConfigError, match="optimizer"):
        resumed.load_checkpoint(path=tmp_path / "c.pt", module=other)
    resumed.load_checkpoint(path=tmp_path / "c.pt", module=other, optimizer=again)
    assert resumed.get_epsilon(1e-5) == engine.get_epsilon(1e-5) > 0
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_without_poisson_sampling_there_is_no_epsilon():
    engine = PrivacyEngine()
    model, optimizer, loader = private(engine, poisson_sampling=False)
    assert [len(x) for x, _ in loader] == [4, 4, 4, 4]
    train_one(model, optimizer, 4)
    with pytest.raises(ConfigError, match="Poisson"):
        engine.get_epsilon(1e-5)


def test_batch_memory_manager_draws_noise_once_a_logical_step():
    model, optimizer, loader = private()
    with (
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for x, _ in parts:
            train_one(model, optimizer, len(x))
    assert optimizer.accountant.history == [(1.0, 0.25, 4)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_first": False}, "axis 0"),
        ({"grad_sample_mode": "fsdp"}, "grad_sample_mode"),
        ({"rand_on_empty": True}, "empty batch"),
        ({"max_grad_norms": 1.0}, "max_grad_norms"),
        ({"max_grad_norm": 0.0}, "max_norm"),
        ({"max_grad_norm": [1.0, 1.0]}, "one norm for each"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"criterion": nn.CrossEntropyLoss(reduction="sum")}, "reduction"),
        ({"clipping": "round"}, "round"),
        ({"memory_budget": 0}, "memory_budget"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        private(**options)
    private()  # nothing is left attached


def test_refused_engines_and_modules():
    with pytest.raises(ConfigError, match="gdp"):
        PrivacyEngine(accountant="gdp")
    with pytest.raises(ConfigError, match="secure_mode"):
        PrivacyEngine(secure_mode=True)
    model, optimizer, loader = small()
    rest = {"data_loader": loader, "noise_multiplier": 1.0, "max_grad_norm": 1.0}
    with pytest.raises(ConfigError, match="train"):
        PrivacyEngine().make_private(module=model.eval(), optimizer=optimizer, **rest)
    mixing = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    sgd = torch.optim.SGD(mixing.parameters(), lr=1)
    with pytest.raises(RefusedModelError, match=r"1 \(BatchNorm1d\)"):
        PrivacyEngine().make_private(module=mixing, optimizer=sgd, **rest)
    every = {"optimizer": sgd, "data_loader": loader}
    assert not PrivacyEngine.is_compatible(module=mixing, **every)
    with pytest.raises(RefusedModelError, match="BatchNorm1d"):
        PrivacyEngine.validate(module=mixing, **every)
    assert PrivacyEngine.is_compatible(module=PrivacyEngine.get_compatible_module(mixing), **every)
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ConfigError, match="LBFGS"):
        PrivacyEngine().make_private(module=model.train(), optimizer=lbfgs, **rest)
    wrapped = nn.DataParallel(model.train())
    with pytest.raises(RefusedModelError, match="DataParallel"):
        PrivacyEngine().make_private(module=wrapped, optimizer=optimizer, **rest)


def test_a_physical_batch_without_backward_is_refused():
    _, optimizer, _ = private()
    optimizer.signal_skip_step(True)
    with pytest.raises(ConfigError, match="without a clipped gradient"):
        optimizer.step()


def test_a_grad_scaler_is_refused():
    model, optimizer, _ = private()
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ConfigError, match="GradScaler"):
        scaler.scale(model(torch.randn(4, 3)).sum()).backward()
    (model(torch.randn(4, 3)).sum() * torch.ones(2, 2)[0, 0].requires_grad_()).backward()  # not to be read
    with pytest.raises(ConfigError, match="GradScaler"):
        scaler.step(optimizer)


def test_a_loader_of_single_samples():
    model, sgd, loader = small(batch=1, count=49)
    _, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=sgd, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    assert optimizer.expected_batch_size == 1


def test_an_accountant_s_own_hook_works():
    engine = PrivacyEngine()
    model, optimizer, _ = private(engine)
    told = engine.accountant.__class__()
    optimizer.attach_step_hook(told.get_optimizer_hook_fn(sample_rate=0.25))
    train_one(model, optimizer, 4)
    assert told.history == engine.accountant.history


def test_ghost_returns_the_criterion_as_opacus_does():
    criterion = nn.CrossEntropyLoss()
    assert private(grad_sample_mode="ghost", criterion=criterion)[2] is criterion


def test_a_loss_of_one_s_own_is_read_in_backward():
    for reduction in (torch.mean, torch.sum):
        model, _, criterion, _ = private(
            grad_sample_mode="ghost", criterion=lambda out, y, r=reduction: -r(out[range(len(y)), y])
        )
        loss = criterion(model(torch.randn(4, 3)), torch.tensor([0, 1, 1, 0]))
        if reduction is torch.sum:
            with pytest.raises(ConfigError, match="sum over the batch"):
                loss.backward()
        else:
            loss.backward()


@pytest.mark.parametrize("wrap_model", [True, False])
def test_no_module_is_wrapped(wrap_model):
    model, optimizer, loader = small()
    rest = {"data_loader": loader, "noise_multiplier": 1.0, "max_grad_norm": 1.0, "wrap_model": wrap_model}
    assert PrivacyEngine().make_private(module=model, optimizer=optimizer, **rest)[0] is model


def test_the_state_of_the_optimizer_can_be_dropped():
    """As scripts do between phases of training."""
    model, optimizer, _ = private()
    optimizer.original_optimizer.param_groups[0]["momentum"] = 0.9
    train_one(model, optimizer, 4)
    assert optimizer.state
    optimizer.state = collections.defaultdict(dict)
    assert not optimizer.original_optimizer.state


def test_every_name_of_opacus_s_engine_is_there():
    theirs = importlib.import_module("opacus").PrivacyEngine
    public = {name for name in vars(theirs) if not name.startswith("_")}
    assert public <= set(dir(PrivacyEngine))
    for name in public:
        here, there = (inspect.signature(getattr(e, name)) for e in (PrivacyEngine, theirs))
        kinds = {p.kind for p in here.parameters.values()}
        assert (
            there.parameters.keys() - {"self"} <= here.parameters.keys()
            or inspect.Parameter.VAR_KEYWORD in kinds
        )
