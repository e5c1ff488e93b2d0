"""Checkpoints change sides: what Opacus's engine wrote psgrad's reads, and the other way round."""

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.schedulers import ExponentialNoise
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from psgrad import ConfigError
from psgrad.dp import PrivacyEngine


class Run:
    """A run on full batches without noise, so that both engines compute the same."""

    def __init__(self, engine):
        torch.manual_seed(0)
        self.engine = engine(accountant="prv")
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
        )
        self.x, self.y = torch.randn(6, 1, 4, 4), torch.randint(0, 3, (6,))
        self.model, self.optimizer, _ = self.engine.make_private(
            module=model,
            optimizer=optim.Adam(model.parameters(), lr=0.05),
            data_loader=DataLoader(TensorDataset(self.x, self.y), batch_size=6),
            noise_multiplier=0.0,
            max_grad_norm=0.1,
        )
        self.scheduler = ExponentialNoise(self.optimizer, gamma=0.5)

    def steps(self, count):
        for _ in range(count):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
            self.scheduler.step()
        return self

    def parts(self):
        return {"module": self.model, "optimizer": self.optimizer, "noise_scheduler": self.scheduler}

    def save(self, path, **more):
        self.engine.save_checkpoint(path=path, **self.parts(), **more)
        return self

    def load(self, path, **more):
        self.engine.load_checkpoint(path=path, **self.parts(), **more)
        return self

    def weights(self):
        return [p.detach() for p in self.model.parameters()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


def test_psgrad_goes_on_where_opacus_was(path):
    written = Run(opacus.PrivacyEngine).steps(3).save(path)
    assert all(
        name.startswith("_module.") for name in torch.load(path, weights_only=False)["module_state_dict"]
    )
    resumed = Run(PrivacyEngine).load(path)
    assert all(map(torch.equal, resumed.weights(), written.weights()))
    assert resumed.engine.accountant.history == written.engine.accountant.history
    assert resumed.scheduler.last_epoch == written.scheduler.last_epoch
    assert resumed.optimizer.max_grad_norm == 0.1
    torch.testing.assert_close(resumed.steps(3).weights(), written.steps(3).weights())
    assert resumed.engine.accountant.history == written.engine.accountant.history


def test_opacus_goes_on_where_psgrad_was(path):
    written = Run(PrivacyEngine).steps(3)
    written.save(path, module_state_dict_kwargs={"prefix": "_module."})
    resumed = Run(opacus.PrivacyEngine).load(path)
    assert all(map(torch.equal, resumed.weights(), written.weights()))
    assert resumed.engine.accountant.history == written.engine.accountant.history
    torch.testing.assert_close(resumed.steps(3).weights(), written.steps(3).weights())
    again = Run(PrivacyEngine).load(path)  # psgrad itself reads both
    torch.testing.assert_close(again.steps(3).weights(), written.weights())


def test_privacy_spent_is_not_forgotten(path):
    Run(opacus.PrivacyEngine).steps(1).save(path)
    checkpoint = torch.load(path, weights_only=False)
    torch.save({**checkpoint, "privacy_accountant_state_dict": {}}, path)
    with pytest.raises((ConfigError, ValueError), match=r"[Aa]ccountant"):
        Run(PrivacyEngine).load(path)
    del checkpoint["privacy_accountant_state_dict"]
    torch.save(checkpoint, path)
    with pytest.raises(ConfigError, match="no state of the privacy_accountant"):
        Run(PrivacyEngine).load(path)


def test_other_names_are_an_error_as_ever(path):
    Run(opacus.PrivacyEngine).save(path)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["module_state_dict"]["other"] = torch.zeros(1)
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match="other"):
        Run(PrivacyEngine).load(path)
