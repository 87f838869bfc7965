"""What this server does not do, each with its sentence: the client then goes without, or says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.call import EITHER, TRAIN, Methods, Unary
from river_gateway.errors import NotSupportedError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from river_gateway.dialects.river_grpc.call import Call, Handler

NO_IMAGES = "images are not supported: the models here read text only"

NO_RETAINED_KV = (
    "keeping the KV cache of an earlier policy is not supported: a cache is only used by the version "
    "that made it"
)


def refusing(sentence: str) -> Handler:
    """A handler that says why not."""

    async def refuse(_call: Call, _asked: Message) -> NoReturn:
        raise NotSupportedError(sentence)

    return refuse


_CUSTOM_LOSS = (
    "custom losses are not supported: use one of the built-in ones, or compute the gradient of your "
    "loss with respect to the log-probabilities and pass it as the weights of cross_entropy"
)
NO_ATTESTATION = "attesting training data is not supported; create the model without an attestation"


async def _release_images(_call: Call, asked: pb.ReleaseImageRequest) -> pb.ReleaseImageResponse:
    """At the end of a session all of its images may go: it never had any."""
    if not asked.close_session:
        raise NotSupportedError(NO_IMAGES)
    return pb.ReleaseImageResponse()


REFUSED_METHODS: Methods = {
    "PrepareLoss": Unary(pb.PrepareLossRequest, TRAIN, refusing(_CUSTOM_LOSS)),
    "CreateTrainingDataAttestation": Unary(
        pb.CreateTrainingDataAttestationRequest, TRAIN, refusing(NO_ATTESTATION)
    ),
    "UploadImage": Unary(pb.UploadImageRequest, EITHER, refusing(NO_IMAGES)),
    "ReleaseImage": Unary(pb.ReleaseImageRequest, EITHER, _release_images),
}
