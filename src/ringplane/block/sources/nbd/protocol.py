"""The numbers of the NBD protocol, by their names in the specification without NBD_ (doc/proto.md, "Values")."""

from __future__ import annotations

# Handshake
MAGIC = b"NBDMAGIC"
OPTION_MAGIC, OLD_MAGIC, OPTION_REPLY_MAGIC = 0x49484156454F5054, 0x00420281861253, 0x3E889045565A9
FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2
OPT_EXPORT_NAME, OPT_ABORT, OPT_GO, OPT_STRUCTURED_REPLY = 1, 2, 7, 8
REP_ACK, REP_INFO = 1, 3
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3

REP_FLAG_ERROR = 1 << 31
REP_ERR_UNSUP = REP_FLAG_ERROR + 1
REP_ERR_POLICY = REP_FLAG_ERROR + 2
REP_ERR_TLS_REQD = REP_FLAG_ERROR + 5
REP_ERR_UNKNOWN = REP_FLAG_ERROR + 6
REP_ERR_SHUTDOWN = REP_FLAG_ERROR + 7

# What the server says of an export: transmission flags.
FLAG_READ_ONLY, FLAG_SEND_FLUSH, FLAG_SEND_FUA = 1 << 1, 1 << 2, 1 << 3
FLAG_SEND_TRIM, FLAG_SEND_WRITE_ZEROES, FLAG_CAN_MULTI_CONN = 1 << 5, 1 << 6, 1 << 8

# Transmission. Requests: 28 bytes and the payload of a write.
REQUEST_MAGIC, REQUEST_SIZE = 0x25609513, 28
CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES = 0, 1, 2, 3, 4, 6
CMD_FLAG_FUA, CMD_FLAG_NO_HOLE = 1, 2

# Replies. SIMPLE: magic, error, cookie, and the data of a read. STRUCTURED: chunks of magic, flags, type, cookie and
# length, and then what the type says. ERROR_TYPE is in the types of all errors.
SIMPLE_MAGIC, SIMPLE_SIZE = 0x67446698, 16
STRUCTURED_MAGIC, STRUCTURED_SIZE = 0x668E33EF, 20
REPLY_FLAG_DONE = 1
TYPE_NONE, TYPE_OFFSET_DATA, TYPE_OFFSET_HOLE, ERROR_TYPE = 0, 1, 2, 1 << 15
DATA_FIELDS, HOLE_FIELDS, ERROR_FIELDS = 8, 12, 6

# A string has at most this many bytes.
LONGEST_STRING = 4096

# Sizes for servers that do not say them.
SMALLEST_BLOCK, PREFERRED_BLOCK, LARGEST_PAYLOAD = 1, 4096, 32 << 20
