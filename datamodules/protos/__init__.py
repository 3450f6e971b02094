"""Messages of the Waymo Open Motion Dataset by field number, in a package of our own so that Waymo's may be loaded beside.

The `*_pb2.py` and `*_pb2.pyi` are generated, at the root of the repository, by any protoc whose Python code runs on protobuf
6.33: `python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. datamodules/protos/*.proto` (grpcio-tools 1.76).
"""

from datamodules import waymo_extra  # noqa: F401 - says what to install where protobuf is missing
