/*
 * The C core: PF_KEYv2 messages of any system, in and out of one flat record.
 *
 * No Python, no allocation, no system header needed to read another system's bytes.  Every function may be called from
 * several threads at once as long as each has buffers of its own.
 */
#ifndef PFK_H
#define PFK_H

#include <stddef.h>
#include <stdint.h>

#define PFK_MAX_EXTENSIONS 48
#define PFK_EXTENSION_NUMBERS 64
#define PFK_MARK 8

/* What an extension carries.  An Abi says which extension number is which; slot 0 is everything kept as it is. */
enum pfk_slot {
	PFK_RAW,
	PFK_SA,
	PFK_LIFETIME_CURRENT,
	PFK_LIFETIME_HARD,
	PFK_LIFETIME_SOFT,
	PFK_ADDRESS_SRC,
	PFK_ADDRESS_DST,
	PFK_KEY_AUTH,
	PFK_KEY_ENCRYPT,
	PFK_SPIRANGE,
	PFK_SUPPORTED_AUTH,
	PFK_SUPPORTED_ENCRYPT,
	PFK_SA2,
	PFK_NAT_T_TYPE,
	PFK_NAT_T_SPORT,
	PFK_NAT_T_DPORT,
	PFK_POLICY,
	PFK_SA_REPLAY,
	/* What follows is rare: its content is checked and stays where it is, the record holds nothing of it. */
	PFK_CHECK_ADDRESS,
	PFK_CHECK_LIFETIME,
	PFK_CHECK_WORD,			/* 8 bytes */
	PFK_CHECK_IDENTITY,
	PFK_CHECK_SENSITIVITY,
	PFK_CHECK_PROPOSAL,
	PFK_CHECK_SEC_CTX,
	PFK_CHECK_KMADDRESS,
	PFK_CHECK_FILTER,
	PFK_CHECK_OFFLOAD,
	PFK_CHECK_SESSION_ID,
	PFK_CHECK_SASTAT,
	PFK_SLOTS
};

/* How a system lays out its bytes: the part of an Abi that the core needs. */
struct pfk_abi {
	uint8_t big_endian;		/* everything but SPIs, ports and addresses */
	uint8_t sockaddr_has_length;	/* sa_len, sa_family; else a 16-bit family */
	uint8_t request_size;		/* sizeof(struct sadb_x_ipsecrequest): 8 or 16 */
	uint8_t af_inet;
	uint8_t af_inet6;
	uint8_t slot[PFK_EXTENSION_NUMBERS];
};

/*
 * The record: every fixed field of a message in the host's order, reserved and padding bytes included, because kernels
 * leave them dirty and a message must encode to the bytes it came from.  Variable parts are offset and length in the
 * message.  A field of an extension means something only when its slot is in `present`.
 */
struct pfk_lifetime {
	uint64_t bytes, addtime, usetime;
	uint32_t allocations;
	uint32_t unused;
};

struct pfk_address {
	uint8_t protocol, prefixlen;
	uint16_t reserved;
	uint16_t port;
	uint8_t version;		/* 4 or 6 */
	uint8_t unused;
	uint32_t flowinfo, scope_id;	/* of a sockaddr_in6 */
	uint8_t address[16];		/* the first 4 for version 4 */
	uint8_t padding[8];		/* sin_zero, or the 4 bytes behind a sockaddr_in6 */
};

struct pfk_part {			/* the variable part of an extension */
	uint32_t offset, length;	/* in bytes, from the start of the message */
};

struct pfk_key {
	uint16_t bits, reserved;
	struct pfk_part data;		/* padding included */
};

struct pfk_supported {
	uint32_t reserved;
	struct pfk_part algorithms;
};

struct pfk_port {
	uint16_t port, reserved;
};

struct pfk_record {
	/* struct sadb_msg */
	uint8_t version, type, error, satype;
	uint16_t length, reserved;	/* length as stated, in 8-byte words */
	uint32_t seq, pid;

	uint32_t present;		/* bit n: slot n */
	uint16_t count;			/* extensions */
	uint16_t words;			/* of the message as received */
	uint16_t offset[PFK_MAX_EXTENSIONS];	/* of each extension, in words */
	uint64_t valid;			/* bit n: the nth extension has a slot and keeps the rules of its type */

	struct pfk_lifetime lifetime[3];	/* current, hard, soft */
	struct pfk_address address[2];		/* src, dst */
	struct pfk_key key[2];			/* authentication, encryption */
	struct pfk_supported supported[2];	/* authentication, encryption */

	uint32_t sa_spi;		/* as a number */
	uint8_t sa_replay, sa_state, sa_auth, sa_encrypt;
	uint32_t sa_flags;

	uint8_t sa2_mode, sa2_reserved1;
	uint16_t sa2_reserved2;
	uint32_t sa2_sequence, sa2_reqid;

	uint32_t spirange_min, spirange_max, spirange_reserved;

	uint8_t nat_t_type, nat_t_type_reserved[3];
	struct pfk_port nat_t_port[2];	/* source, destination */

	uint16_t policy_type;
	uint8_t policy_direction, policy_scope;
	uint32_t policy_id, policy_priority;
	struct pfk_part policy_requests;

	uint32_t replay;

	struct pfk_part body;		/* what follows the header of a PROMISC message */
};

/* Why bytes are no message, or a record cannot be written.  pfk_reason() has the words. */
enum pfk_reason {
	PFK_OK,
	PFK_SHORT_HEADER,
	PFK_BAD_VERSION,
	PFK_NOT_WORDS,
	PFK_TOO_LONG,
	PFK_STATED_TOO_SHORT,
	PFK_TRUNCATED,
	PFK_TOO_MANY,
	PFK_LENGTH_ZERO,
	PFK_PAST_END,
	PFK_TYPE_ZERO,
	PFK_DUPLICATE,
	PFK_WRONG_SIZE,
	PFK_BAD_FAMILY,
	PFK_BAD_SOCKADDR_LENGTH,
	PFK_BAD_PREFIX,
	PFK_KEY_TOO_SHORT,
	PFK_REQUEST_TOO_SHORT,
	PFK_REQUEST_PAST_END,
	PFK_FAMILIES,
	PFK_BAD_COUNT,
	PFK_NO_SPACE,
	PFK_BAD_PART,
	PFK_REASONS
};

struct pfk_fault {
	uint32_t reason;	/* enum pfk_reason */
	uint32_t offset;	/* in bytes, from the start of the message */
	uint32_t extension;	/* its number on the wire; 0 for the header */
	uint32_t index;		/* of the message in a batch */
};

/**
 * Validate a message and read all its fields.
 *
 * Trusts nothing in `data`, which holds `length` bytes: one message as received.  A message whose errno is not 0 echoes
 * what a kernel rejected, so content that breaks a rule is kept raw there (its slot is not in `present`) as long as the
 * extensions can be told apart.  A stated length smaller than `length` is accepted, and one that is larger by as much as
 * Linux 6.1 miscounts for what is here: policies with a tunnel template of the other address family before a transport
 * template.  What was received is decoded.
 *
 * Returns 0 and fills `record`, or a reason and fills `fault`.
 */
int pfk_decode(const struct pfk_abi *abi, const uint8_t *data, size_t length, struct pfk_record *record,
	       struct pfk_fault *fault);

/**
 * Decode `count` messages that lie one after the other in `arena`, the nth `lengths[n]` bytes long, into `records`.
 *
 * Returns 0, or the reason of the first message that is none; `fault->index` says which.
 */
int pfk_decode_many(const struct pfk_abi *abi, const uint8_t *arena, const uint32_t *lengths, size_t count,
		    struct pfk_record *records, struct pfk_fault *fault);

/**
 * Decode `count` messages that lie in the `size` bytes of `arena` with a mark of PFK_MARK bytes between them, each as long as
 * it states; their lengths go to `lengths`.
 *
 * Returns 0, or -1 when a message is none or a mark is not where a stated length ends: then pfk_decode_many(), with the
 * true lengths, has the last word.
 */
int pfk_decode_marked(const struct pfk_abi *abi, const uint8_t *arena, size_t size, const uint8_t *mark, size_t count,
		      uint32_t *lengths, struct pfk_record *records, struct pfk_fault *fault);

/**
 * Write the message that a record describes.
 *
 * `blob` holds what is variable: for each extension of the record, at its offset, the 4 bytes of its header (their
 * length counts for raw extensions only), and the parts.  For a decoded record the blob is the message it came from.
 * All lengths are computed, except that a stated length that differed from the received one is written as it was.
 *
 * Returns the number of bytes written to `out`, or 0 and fills `fault`.
 */
size_t pfk_encode(const struct pfk_abi *abi, const uint8_t *record, const uint8_t *blob, size_t blob_length, uint8_t *out,
		  size_t capacity, struct pfk_fault *fault);

/** The words for a reason; never NULL. */
const char *pfk_reason(uint32_t reason);

/** Overwrite a buffer that held keys, in a way that a compiler does not remove. */
void pfk_wipe(uint8_t *buffer, size_t length);

/** This host's PF_KEY, or -1 where it has none: BSD Pythons have no socket.AF_KEY. */
int pfk_pf_key(void);

/**
 * Send `count` messages that lie one after the other in `arena`, each by itself, `lengths[n]` bytes long.
 *
 * sendmmsg() on Linux, a loop elsewhere.  Returns how many were taken; when that is fewer than `count`, `*error` is the
 * errno of the first that was not.
 */
int pfk_send_many(int fd, const uint8_t *arena, const uint32_t *lengths, int count, int *error);

/**
 * Receive up to `count` messages of up to `size` bytes; they lie one after the other in `arena`, `lengths[n]` is the
 * length of the nth.  `arena` has room for `count` times `size` bytes, of which those behind the last message are wiped
 * where they were used.
 *
 * Waits up to `timeout` milliseconds (negative: for ever) for the first and takes what else is there already: recvmmsg()
 * on Linux, a loop elsewhere.  A message longer than `size` is left out; its length says how long it was where the
 * system tells (Linux), else it is `size` + 1.  Returns how many came, 0 at the timeout, -1 with `*error` set to errno.
 */
int pfk_receive_many(int fd, uint8_t *arena, uint32_t size, uint32_t *lengths, int count, int timeout, int *error);

#endif
