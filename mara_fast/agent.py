"""The accept model: a three-layer perceptron on the language model's last hidden state."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mara_fast.card import is_hub_id, model_card
from mara_fast.config import DecodingConfig
from mara_kernels.score import AgentParameters, FoldCache, score

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OFFICIAL_HINT = (
    "An official actor.pth is read by MaraAgent.from_official, and turned into an agent folder by "
    "`mara-fast convert`"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What is stored beside an agent's weights."""

    hidden_size: int
    """Size of the states it judges: the language model's hidden size."""
    inner_size: int = 1024
    """Width of the first layer; the second has a quarter of it. Paper: 1024 and 256."""
    base_model: str | None = None
    """Language model it was trained for, as a hub id."""
    decoding: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Decoding options it was trained with, the defaults when it decodes."""
    description: str | None = None
    """What its card says of it."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "inner_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; allowed: an integer >= 1")
        if self.inner_size % 4:
            raise ValueError(
                f"inner_size={self.inner_size} is not allowed; allowed: multiples of 4"
            )
        for name in ("base_model", "description"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name}={value!r} is not allowed; allowed: a text or None")
        DecodingConfig.from_dict(self.decoding)


class MaraAgent(nn.Module):
    """Accepts or rejects a candidate token from the state it leads to (MARA section 3.2).

        LayerNorm(H) -> Linear(H, I) -> ReLU -> Linear(I, I/4) -> ReLU -> Linear(I/4, 2)

    With H = 4096 and I = 1024 it has 4,466,434 parameters. Output 0 is reject, 1 accept. The names
    of the parameters are those of the authors' checkpoints.

    Args:
        hidden_size: H.
        inner_size: I.
        base_model, decoding, description: kept in ``config``, see :class:`AgentConfig`.
    """

    def __init__(self, hidden_size: int, inner_size: int = 1024, **described: Any) -> None:
        super().__init__()
        self.config = AgentConfig(hidden_size=hidden_size, inner_size=inner_size, **described)
        self.ln = nn.LayerNorm(hidden_size)
        self.linear1 = nn.Linear(hidden_size, inner_size)
        self.linear2 = nn.Linear(inner_size, inner_size // 4)
        self.output_linear = nn.Linear(inner_size // 4, 2)
        self._fold_cache = FoldCache()

    @property
    def parameters_for_scoring(self) -> AgentParameters:
        """The parameters as the scoring kernel takes them."""
        return AgentParameters(
            self.ln.weight,
            self.ln.bias,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            self.output_linear.weight,
            self.output_linear.bias,
            self.ln.eps,
        )

    def refresh_scoring(self) -> None:
        """Has the scoring kernel look at the parameters anew, however they were written."""
        self._fold_cache.invalidate()

    @property
    def decoding(self) -> DecodingConfig:
        """The decoding options it was trained with, over the general defaults."""
        return DecodingConfig.from_dict(self.config.decoding)

    def accept_logit(self, states: Tensor) -> Tensor:
        """Accept logits ``z_accept - z_reject``.

        Args:
            states: [..., H], the language model's last hidden state after its final norm.

        Returns:
            float32 [...]. The accept probability is its sigmoid.
        """
        flat = states.reshape(-1, states.shape[-1])
        d = score(flat, self.parameters_for_scoring, cache=self._fold_cache)
        return d.view(states.shape[:-1])

    def forward(self, states: Tensor) -> Tensor:
        """Both logits, [..., 2]: reject, accept."""
        x = self.ln(states.to(self.ln.weight.dtype))
        x = torch.relu(self.linear2(torch.relu(self.linear1(x))))
        return self.output_linear(x)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes ``config.json``, ``model.safetensors`` and the model card into a folder."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, path / WEIGHTS_NAME, metadata={"format": "pt"})
        config = dataclasses.asdict(self.config) | {"model_type": "mara_agent"}
        (path / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (path / "README.md").write_text(model_card(self.config), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload MARA agent",
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes to the Hugging Face Hub; returns the URL."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                revision=revision,
                commit_message=commit_message,
            )
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Loads an agent from a folder or a hub id.

        Raises:
            FileNotFoundError: no such folder or hub id, or it lacks a file.
            ValueError: broken files, missing or extra keys, wrong shapes, NaN or infinite weights.
        """
        if dtype not in _DTYPES:
            raise ValueError(
                f"dtype={dtype!r} is not allowed; allowed: {', '.join(map(str, _DTYPES))}"
            )

        def fetch(name: str) -> Path:
            if Path(source).is_file():
                raise ValueError(
                    f"{os.fspath(source)} is a file, expected a folder or a hub id. "
                    + _OFFICIAL_HINT
                )
            if Path(source).is_dir():
                path = Path(source) / name
                if not path.is_file():
                    raise FileNotFoundError(
                        f"{os.fspath(source)} is not an agent folder: it has no {name}. "
                        + _OFFICIAL_HINT
                    )
                return path
            if not is_hub_id(os.fspath(source)):
                raise FileNotFoundError(f"no agent folder at {os.fspath(source)}")
            return Path(
                hf_hub_download(
                    os.fspath(source),
                    name,
                    revision=revision,
                    token=token,
                    cache_dir=None if cache_dir is None else Path(cache_dir),
                    local_files_only=local_files_only,
                )
            )

        config_path, weights_path = fetch(CONFIG_NAME), fetch(WEIGHTS_NAME)
        try:
            values = json.loads(config_path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{config_path} is not valid JSON: {error}") from error
        names = {field.name for field in dataclasses.fields(AgentConfig)}
        if not isinstance(values, dict) or "hidden_size" not in values:
            raise ValueError(f"{config_path} is not an agent's config: it lacks hidden_size")
        try:
            config = AgentConfig(**{k: v for k, v in values.items() if k in names})
            state = load_file(weights_path)
        except SafetensorError as error:
            raise ValueError(f"{weights_path} is not a safetensors file: {error}") from error
        except ValueError as error:
            raise ValueError(f"{config_path}: {error}") from error
        return cls._from_state(state, config, origin=str(weights_path), dtype=dtype).to(device)

    @classmethod
    def from_official(
        cls, path: str | os.PathLike, *, decoding: DecodingConfig | None = None, **described: Any
    ) -> Self:
        """Loads the authors' ``actor.pth``; sizes come from its shapes. Nothing in it is executed.

        Args:
            path: a state dict saved by the authors' training (keys ln, linear1, linear2,
                output_linear).
            decoding: stored as the agent's defaults; :meth:`DecodingConfig.official` if None.
            described: ``base_model`` and ``description`` of the config.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a plain state dict (a pickle with code in it, for instance), missing or
                extra keys, wrong shapes, NaN or infinite weights.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        # A broken pickle may raise anything.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "unreadable"
            raise ValueError(
                f"{path} was refused: it is not a plain state dict of tensors, and files that hold "
                f"code are never executed ({reason})"
            ) from error
        if not isinstance(state, dict):
            raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
        weight = state.get("linear1.weight")
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(
                f"{path} is not an official actor: it has no 2-D linear1.weight; "
                f"its keys: {', '.join(map(str, list(state)[:8])) or 'none'}"
            )
        config = AgentConfig(
            hidden_size=weight.shape[1],
            inner_size=weight.shape[0],
            decoding=decoding_options(decoding or DecodingConfig.official()),
            **described,
        )
        return cls._from_state(state, config, origin=str(path), dtype=torch.float32)

    @classmethod
    def _from_state(
        cls, state: dict[str, Tensor], config: AgentConfig, *, origin: str, dtype: torch.dtype
    ) -> Self:
        with torch.device("meta"):
            agent = cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
        expected = agent.state_dict()
        missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
        if missing or extra:
            raise ValueError(
                f"{origin} does not hold a MARA agent: missing keys {sorted(missing) or 'none'}, "
                f"extra keys {sorted(map(str, extra)) or 'none'}"
            )
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.shape != expected[name].shape:
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(
                    f"{origin}: {name} has shape {got}, expected {tuple(expected[name].shape)} "
                    f"for hidden_size={config.hidden_size}, inner_size={config.inner_size}"
                )
            is_plain = tensor.layout == torch.strided and not tensor.is_meta
            if not is_plain or tensor.dtype not in _DTYPES:
                raise ValueError(
                    f"{origin}: {name} is a {tensor.dtype} tensor ({tensor.layout}, "
                    f"{tensor.device}), expected a dense one of {', '.join(map(str, _DTYPES))}"
                )
            if not tensor.to(dtype).isfinite().all():
                raise ValueError(f"{origin}: {name} holds NaN or infinite values as {dtype}")
        # Copies: tensors of a checkpoint may be views of one storage, which cannot be saved again.
        layout = torch.contiguous_format
        state = {k: v.to(dtype, copy=True, memory_format=layout) for k, v in state.items()}
        agent.load_state_dict(state, assign=True)
        return agent.requires_grad_(False).eval()


def decoding_options(config: DecodingConfig) -> dict[str, Any]:
    """The options that differ from the defaults, as stored in an agent's config."""
    defaults = DecodingConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != defaults[name]}
