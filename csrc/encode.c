/* From a record to bytes: one small writer for each kind of extension; every length is computed here. */
#include <string.h>

#include "wire.h"

struct writer {
	const struct pfk_abi *abi;
	const struct pfk_record *record;
	const uint8_t *blob;
	size_t blob_length;
	uint8_t *out;
	size_t length, capacity;
	struct pfk_fault *fault;
};

static int fail(struct writer *writer, enum pfk_reason reason)
{
	writer->fault->reason = reason;
	writer->fault->offset = (uint32_t)writer->length;
	return (int)reason;
}

/* Room for an extension of `length` bytes, zeroed, its header written; NULL and a fault when there is none. */
static uint8_t *begin(struct writer *writer, unsigned type, size_t length)
{
	uint8_t *p = writer->out + writer->length;

	if (length / PFK_WORD > UINT16_MAX || length > writer->capacity - writer->length) {
		fail(writer, PFK_NO_SPACE);
		return NULL;
	}
	memset(p, 0, length);
	put16(writer->abi, p, (uint16_t)(length / PFK_WORD));
	put16(writer->abi, p + 2, (uint16_t)type);
	writer->length += length;
	return p;
}

/* Where a variable part lies in the blob; NULL and a fault when it does not. */
static const uint8_t *part_of(struct writer *writer, const struct pfk_part *part)
{
	if (part->offset > writer->blob_length || part->length > writer->blob_length - part->offset) {
		fail(writer, PFK_BAD_PART);
		return NULL;
	}
	return writer->blob + part->offset;
}

/* An extension that is a head of `head` bytes and a variable part, padded to a word. */
static uint8_t *begin_with_part(struct writer *writer, unsigned type, size_t head, const struct pfk_part *part)
{
	const uint8_t *from = part_of(writer, part);
	uint8_t *p = from ? begin(writer, type, (head + part->length + 7) / PFK_WORD * PFK_WORD) : NULL;

	if (p)
		memcpy(p + head, from, part->length);
	return p;
}

static int write_sa(struct writer *writer, unsigned type, int which)
{
	const struct pfk_record *record = writer->record;
	uint8_t *p = begin(writer, type, 16);

	(void)which;
	if (!p)
		return (int)writer->fault->reason;
	put32_network(p + 4, record->sa_spi);
	p[8] = record->sa_replay;
	p[9] = record->sa_state;
	p[10] = record->sa_auth;
	p[11] = record->sa_encrypt;
	put32(writer->abi, p + 12, record->sa_flags);
	return 0;
}

static int write_lifetime(struct writer *writer, unsigned type, int which)
{
	const struct pfk_lifetime *lifetime = &writer->record->lifetime[which];
	uint8_t *p = begin(writer, type, 32);

	if (!p)
		return (int)writer->fault->reason;
	put32(writer->abi, p + 4, lifetime->allocations);
	put64(writer->abi, p + 8, lifetime->bytes);
	put64(writer->abi, p + 16, lifetime->addtime);
	put64(writer->abi, p + 24, lifetime->usetime);
	return 0;
}

static void write_family(const struct pfk_abi *abi, uint8_t *p, size_t length, uint8_t family)
{
	if (abi->sockaddr_has_length) {
		p[0] = (uint8_t)length;
		p[1] = family;
	} else {
		put16(abi, p, family);
	}
}

static int write_address(struct writer *writer, unsigned type, int which)
{
	const struct pfk_abi *abi = writer->abi;
	const struct pfk_address *address = &writer->record->address[which];
	int four = address->version == 4;
	uint8_t *p = begin(writer, type, four ? 24 : 40);

	if (!p)
		return (int)writer->fault->reason;
	p[4] = address->protocol;
	p[5] = address->prefixlen;
	put16(abi, p + 6, address->reserved);
	write_family(abi, p + 8, four ? PFK_SOCKADDR_IN : PFK_SOCKADDR_IN6, four ? abi->af_inet : abi->af_inet6);
	put16_network(p + 10, address->port);
	if (four) {
		memcpy(p + 12, address->address, 4);
		memcpy(p + 16, address->padding, 8);
	} else {
		put32_network(p + 12, address->flowinfo);
		memcpy(p + 16, address->address, 16);
		put32(abi, p + 32, address->scope_id);
		memcpy(p + 36, address->padding, 4);
	}
	return 0;
}

static int write_key(struct writer *writer, unsigned type, int which)
{
	const struct pfk_key *key = &writer->record->key[which];
	uint8_t *p = begin_with_part(writer, type, 8, &key->data);

	if (!p)
		return (int)writer->fault->reason;
	put16(writer->abi, p + 4, key->bits);
	put16(writer->abi, p + 6, key->reserved);
	return 0;
}

static int write_spirange(struct writer *writer, unsigned type, int which)
{
	const struct pfk_record *record = writer->record;
	uint8_t *p = begin(writer, type, 16);

	(void)which;
	if (!p)
		return (int)writer->fault->reason;
	put32(writer->abi, p + 4, record->spirange_min);
	put32(writer->abi, p + 8, record->spirange_max);
	put32(writer->abi, p + 12, record->spirange_reserved);
	return 0;
}

static int write_supported(struct writer *writer, unsigned type, int which)
{
	const struct pfk_supported *supported = &writer->record->supported[which];
	uint8_t *p = begin_with_part(writer, type, 8, &supported->algorithms);

	if (!p)
		return (int)writer->fault->reason;
	put32(writer->abi, p + 4, supported->reserved);
	return 0;
}

static int write_sa2(struct writer *writer, unsigned type, int which)
{
	const struct pfk_record *record = writer->record;
	uint8_t *p = begin(writer, type, 16);

	(void)which;
	if (!p)
		return (int)writer->fault->reason;
	p[4] = record->sa2_mode;
	p[5] = record->sa2_reserved1;
	put16(writer->abi, p + 6, record->sa2_reserved2);
	put32(writer->abi, p + 8, record->sa2_sequence);
	put32(writer->abi, p + 12, record->sa2_reqid);
	return 0;
}

static int write_nat_t_type(struct writer *writer, unsigned type, int which)
{
	uint8_t *p = begin(writer, type, 8);

	(void)which;
	if (!p)
		return (int)writer->fault->reason;
	p[4] = writer->record->nat_t_type;
	memcpy(p + 5, writer->record->nat_t_type_reserved, 3);
	return 0;
}

static int write_nat_t_port(struct writer *writer, unsigned type, int which)
{
	const struct pfk_port *port = &writer->record->nat_t_port[which];
	uint8_t *p = begin(writer, type, 8);

	if (!p)
		return (int)writer->fault->reason;
	put16_network(p + 4, port->port);
	put16(writer->abi, p + 6, port->reserved);
	return 0;
}

static int write_replay(struct writer *writer, unsigned type, int which)
{
	uint8_t *p = begin(writer, type, 8);

	(void)which;
	if (!p)
		return (int)writer->fault->reason;
	put32(writer->abi, p + 4, writer->record->replay);
	return 0;
}

static int write_policy(struct writer *writer, unsigned type, int which)
{
	const struct pfk_record *record = writer->record;
	uint8_t *p = begin_with_part(writer, type, 16, &record->policy_requests);

	(void)which;
	if (!p)
		return (int)writer->fault->reason;
	put16(writer->abi, p + 4, record->policy_type);
	p[6] = record->policy_direction;
	p[7] = record->policy_scope;
	put32(writer->abi, p + 8, record->policy_id);
	put32(writer->abi, p + 12, record->policy_priority);
	return 0;
}

static const struct {
	int (*write)(struct writer *writer, unsigned type, int which);
	int which;
} writers[PFK_CHECK_ADDRESS] = {
	[PFK_SA] = { write_sa, 0 },
	[PFK_LIFETIME_CURRENT] = { write_lifetime, 0 },
	[PFK_LIFETIME_HARD] = { write_lifetime, 1 },
	[PFK_LIFETIME_SOFT] = { write_lifetime, 2 },
	[PFK_ADDRESS_SRC] = { write_address, 0 },
	[PFK_ADDRESS_DST] = { write_address, 1 },
	[PFK_KEY_AUTH] = { write_key, 0 },
	[PFK_KEY_ENCRYPT] = { write_key, 1 },
	[PFK_SPIRANGE] = { write_spirange, 0 },
	[PFK_SUPPORTED_AUTH] = { write_supported, 0 },
	[PFK_SUPPORTED_ENCRYPT] = { write_supported, 1 },
	[PFK_SA2] = { write_sa2, 0 },
	[PFK_NAT_T_TYPE] = { write_nat_t_type, 0 },
	[PFK_NAT_T_SPORT] = { write_nat_t_port, 0 },
	[PFK_NAT_T_DPORT] = { write_nat_t_port, 1 },
	[PFK_POLICY] = { write_policy, 0 },
	[PFK_SA_REPLAY] = { write_replay, 0 },
};

static int write_raw(struct writer *writer, unsigned type, struct pfk_part part)
{
	const uint8_t *from = part_of(writer, &part);
	uint8_t *p;

	if (!from)
		return (int)writer->fault->reason;
	if (part.length == 0)
		return fail(writer, PFK_BAD_PART);
	p = begin(writer, type, part.length);
	if (!p)
		return (int)writer->fault->reason;
	memcpy(p, from, part.length);
	return 0;
}

/* The extension whose header lies at `offset` of the blob. */
static int write_extension(struct writer *writer, uint32_t offset)
{
	struct pfk_part header = { offset, 4 };
	const uint8_t *from = part_of(writer, &header);
	unsigned type, slot;

	if (!from)
		return (int)writer->fault->reason;
	type = get16(writer->abi, from + 2);
	writer->fault->extension = type;
	slot = type < PFK_EXTENSION_NUMBERS ? writer->abi->slot[type] : PFK_RAW;
	if (slot != PFK_RAW && slot < PFK_CHECK_ADDRESS && writer->record->present >> slot & 1)
		return writers[slot].write(writer, type, writers[slot].which);
	header.length = (uint32_t)get16(writer->abi, from) * PFK_WORD;
	return write_raw(writer, type, header);
}

static int write_body(struct writer *writer)
{
	const struct pfk_part *body = &writer->record->body;
	const uint8_t *from = part_of(writer, body);

	if (!from)
		return (int)writer->fault->reason;
	if (body->length > writer->capacity - writer->length || body->length % PFK_WORD)
		return fail(writer, PFK_NO_SPACE);
	memcpy(writer->out + writer->length, from, body->length);
	writer->length += body->length;
	return 0;
}

/* What the header states: the truth, or what it stated when it came from a kernel that states something else. */
static uint16_t stated_length(const struct writer *writer)
{
	const struct pfk_record *record = writer->record;

	return record->length != record->words ? record->length : (uint16_t)(writer->length / PFK_WORD);
}

static void write_header(struct writer *writer)
{
	const struct pfk_record *record = writer->record;
	uint8_t *p = writer->out;

	p[0] = record->version;
	p[1] = record->type;
	p[2] = record->error;
	p[3] = record->satype;
	put16(writer->abi, p + 4, stated_length(writer));
	put16(writer->abi, p + 6, record->reserved);
	put32(writer->abi, p + 8, record->seq);
	put32(writer->abi, p + 12, record->pid);
}

size_t pfk_encode(const struct pfk_abi *abi, const uint8_t *record, const uint8_t *blob, size_t blob_length, uint8_t *out,
		  size_t capacity, struct pfk_fault *fault)
{
	struct pfk_record copy;		/* aligned, whatever `record` is */
	struct writer writer = { abi, &copy, blob, blob_length, out, PFK_HEADER, capacity, fault };

	memcpy(&copy, record, sizeof copy);
	memset(fault, 0, sizeof *fault);
	if (capacity < PFK_HEADER || copy.count > PFK_MAX_EXTENSIONS) {
		fail(&writer, capacity < PFK_HEADER ? PFK_NO_SPACE : PFK_TOO_MANY);
		return 0;
	}
	for (unsigned i = 0; i < copy.count; i++)
		if (write_extension(&writer, (uint32_t)copy.offset[i] * PFK_WORD))
			return 0;
	fault->extension = 0;
	if (copy.body.length && write_body(&writer))
		return 0;
	if (writer.length / PFK_WORD > UINT16_MAX) {
		fail(&writer, PFK_TOO_LONG);
		return 0;
	}
	write_header(&writer);
	return writer.length;
}

static const char *const reasons[PFK_REASONS] = {
	[PFK_OK] = "nothing is wrong",
	[PFK_SHORT_HEADER] = "a message has a header of 16 bytes; fewer are here",
	[PFK_BAD_VERSION] = "the version is not 2",
	[PFK_NOT_WORDS] = "a message is a multiple of 8 bytes long",
	[PFK_TOO_LONG] = "a message is at most 65535 words of 8 bytes long",
	[PFK_STATED_TOO_SHORT] = "the stated length is less than that of a header",
	[PFK_TRUNCATED] = "the stated length is more than what is here",
	[PFK_TOO_MANY] = "more than 48 extensions",
	[PFK_LENGTH_ZERO] = "an extension of length 0",
	[PFK_PAST_END] = "the extension goes on past the end of the message",
	[PFK_TYPE_ZERO] = "an extension of type 0",
	[PFK_DUPLICATE] = "the extension is here for the second time",
	[PFK_WRONG_SIZE] = "the extension has another size than its type allows",
	[PFK_BAD_FAMILY] = "the address is neither IPv4 nor IPv6 in this system's numbers",
	[PFK_BAD_SOCKADDR_LENGTH] = "the sockaddr's length does not fit its family or its extension",
	[PFK_BAD_PREFIX] = "the prefix is longer than the address",
	[PFK_KEY_TOO_SHORT] = "the key has more bits than its extension holds",
	[PFK_REQUEST_TOO_SHORT] = "a policy request is shorter than its head",
	[PFK_REQUEST_PAST_END] = "a policy request goes on past the end of its extension",
	[PFK_FAMILIES] = "the two addresses of a pair are of different families",
	[PFK_BAD_COUNT] = "the lengths inside the extension do not add up to its size",
	[PFK_NO_SPACE] = "it is longer than its length field can say",
	[PFK_BAD_PART] = "a variable part lies outside what was given",
};

const char *pfk_reason(uint32_t reason)
{
	return reason < PFK_REASONS && reasons[reason] ? reasons[reason] : "unknown reason";
}

/* A compiler that sees memset may leave out what nobody reads; through a volatile pointer it cannot see it. */
static void *(*const volatile overwrite)(void *, int, size_t) = memset;

void pfk_wipe(uint8_t *buffer, size_t length)
{
	overwrite(buffer, 0, length);
}
