"""River's client: train open models over an API, sample from them and chat with them.

    import river_client as river

    client = river.Client()
    with client.session() as session:
        model = session.create_model(base_model="river/tiny-moe")
        groups = model.sample(prompts=["2 + 2 ="], num_samples=4)
        model.forward_backward(data=[...], loss_fn="importance_sampling")
        model.optim_step(lr=4e-5)

`Client` blocks; `AsyncClient` has the same names for `async` code.
"""

from river_client.async_client import AsyncClient, AsyncSession
from river_client.async_learning import AsyncLearning, AsyncLocalLearning
from river_client.async_model import AsyncModel
from river_client.client import Client, Model, PendingOp, Session
from river_client.custom_loss import CustomLoss, TorchLoss, torch_loss
from river_client.exceptions import (
    AuthenticationError,
    ConnectionError,  # noqa: A004 - its name in the documentation
    InvalidRequestError,
    NotFoundError,
    OperationFailedError,
    OutOfCreditError,
    PermissionDeniedError,
    RateLimitError,
    RiverError,
    ServerError,
    TimeoutError,  # noqa: A004 - its name in the documentation
)
from river_client.feedback_wire import Feedback, FeedbackBatch
from river_client.learning import Learning, LocalLearning
from river_client.learning_wire import LearningState, StartLearning
from river_client.pending import AsyncPendingOp
from river_client.results import ChatReply, Sample, SampleOptions, TopLogprobs, TrainingResult
from river_client.samples_wire import (
    LoggedCompletion,
    SamplesLogged,
    SamplesPage,
    StoredGroup,
)
from river_client.usage_wire import UsageRow
from river_client.wire import (
    AdamParams,
    Alias,
    AliasTarget,
    ApiKey,
    BaseModel,
    Checkpoint,
    LoraConfig,
    Price,
    QueueState,
    Run,
    Tenant,
    TopLogprob,
    UsageLine,
)

__version__ = "0.1.0"

__all__ = [
    "AdamParams",
    "Alias",
    "AliasTarget",
    "ApiKey",
    "AsyncClient",
    "AsyncLearning",
    "AsyncLocalLearning",
    "AsyncModel",
    "AsyncPendingOp",
    "AsyncSession",
    "AuthenticationError",
    "BaseModel",
    "ChatReply",
    "Checkpoint",
    "Client",
    "ConnectionError",
    "CustomLoss",
    "Feedback",
    "FeedbackBatch",
    "InvalidRequestError",
    "Learning",
    "LearningState",
    "LocalLearning",
    "LoggedCompletion",
    "LoraConfig",
    "Model",
    "NotFoundError",
    "OperationFailedError",
    "OutOfCreditError",
    "PendingOp",
    "PermissionDeniedError",
    "Price",
    "QueueState",
    "RateLimitError",
    "RiverError",
    "Run",
    "Sample",
    "SampleOptions",
    "SamplesLogged",
    "SamplesPage",
    "ServerError",
    "Session",
    "StartLearning",
    "StoredGroup",
    "Tenant",
    "TimeoutError",
    "TopLogprob",
    "TopLogprobs",
    "TorchLoss",
    "TrainingResult",
    "UsageLine",
    "UsageRow",
    "torch_loss",
]
