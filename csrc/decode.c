/* From bytes to a record: one walk over the extensions, one small reader for each kind. */
#include <string.h>

#include "wire.h"

struct reader {
	const struct pfk_abi *abi;
	const uint8_t *start;		/* of the message */
	struct pfk_record *record;
	struct pfk_fault *fault;
};

/* Note why; the offset is that of the byte that breaks the rule. */
static int fail(struct reader *reader, enum pfk_reason reason, const uint8_t *at)
{
	reader->fault->reason = reason;
	reader->fault->offset = (uint32_t)(at - reader->start);
	return (int)reason;
}

static struct pfk_part part(const struct reader *reader, const uint8_t *p, size_t length)
{
	struct pfk_part part = { (uint32_t)(p - reader->start), (uint32_t)length };
	return part;
}

static int read_sa(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	struct pfk_record *record = reader->record;

	(void)which;
	if (length != 16)
		return fail(reader, PFK_WRONG_SIZE, p);
	record->sa_spi = get32_big(p + 4);
	record->sa_replay = p[8];
	record->sa_state = p[9];
	record->sa_auth = p[10];
	record->sa_encrypt = p[11];
	record->sa_flags = get32(reader->abi, p + 12);
	return 0;
}

static int read_lifetime(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	struct pfk_lifetime *lifetime = &reader->record->lifetime[which];

	if (length != 32)
		return fail(reader, PFK_WRONG_SIZE, p);
	lifetime->allocations = get32(reader->abi, p + 4);
	lifetime->bytes = get64(reader->abi, p + 8);
	lifetime->addtime = get64(reader->abi, p + 16);
	lifetime->usetime = get64(reader->abi, p + 24);
	return 0;
}

/* 4 or 6, or 0 for a family that is neither. */
static uint8_t ip_version(const struct pfk_abi *abi, const uint8_t *sockaddr)
{
	unsigned family = abi->sockaddr_has_length ? sockaddr[1] : get16(abi, sockaddr);

	if (family == abi->af_inet)
		return 4;
	return family == abi->af_inet6 ? 6 : 0;
}

/* The length of the sockaddr at `p`, of which `room` bytes are there; 0 and a fault when it is none. */
static size_t sockaddr_length(struct reader *reader, const uint8_t *p, size_t room, uint8_t *version)
{
	size_t length;

	*version = room >= 2 ? ip_version(reader->abi, p) : 0;
	if (*version == 0) {
		fail(reader, PFK_BAD_FAMILY, p);
		return 0;
	}
	length = *version == 4 ? PFK_SOCKADDR_IN : PFK_SOCKADDR_IN6;
	if (length > room || (reader->abi->sockaddr_has_length && p[0] != length)) {
		fail(reader, PFK_BAD_SOCKADDR_LENGTH, p);
		return 0;
	}
	return length;
}

static int parse_address(struct reader *reader, const uint8_t *p, size_t length, struct pfk_address *address)
{
	size_t size;

	if (length < 8 + PFK_SOCKADDR_IN)
		return fail(reader, PFK_WRONG_SIZE, p);
	size = sockaddr_length(reader, p + 8, length - 8, &address->version);
	if (size == 0)
		return (int)reader->fault->reason;
	if (length != (8 + size + 7) / 8 * 8)
		return fail(reader, PFK_WRONG_SIZE, p);
	address->protocol = p[4];
	address->prefixlen = p[5];
	address->reserved = get16(reader->abi, p + 6);
	address->port = get16_network(p + 10);
	if (address->prefixlen > (address->version == 4 ? 32 : 128))
		return fail(reader, PFK_BAD_PREFIX, p + 5);
	if (address->version == 4) {
		memcpy(address->address, p + 12, 4);
		memcpy(address->padding, p + 16, 8);
	} else {
		address->flowinfo = get32_big(p + 12);
		memcpy(address->address, p + 16, 16);
		address->scope_id = get32(reader->abi, p + 32);
		memcpy(address->padding, p + 36, 4);
	}
	return 0;
}

static int read_address(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	return parse_address(reader, p, length, &reader->record->address[which]);
}

static int read_key(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	struct pfk_key *key = &reader->record->key[which];

	key->bits = get16(reader->abi, p + 4);
	key->reserved = get16(reader->abi, p + 6);
	if ((key->bits + 7u) / 8 > length - 8)
		return fail(reader, PFK_KEY_TOO_SHORT, p + 4);
	key->data = part(reader, p + 8, length - 8);
	return 0;
}

static int read_spirange(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	struct pfk_record *record = reader->record;

	(void)which;
	if (length != 16)
		return fail(reader, PFK_WRONG_SIZE, p);
	record->spirange_min = get32(reader->abi, p + 4);
	record->spirange_max = get32(reader->abi, p + 8);
	record->spirange_reserved = get32(reader->abi, p + 12);
	return 0;
}

static int read_supported(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	struct pfk_supported *supported = &reader->record->supported[which];

	supported->reserved = get32(reader->abi, p + 4);
	supported->algorithms = part(reader, p + 8, length - 8);
	return 0;
}

static int read_sa2(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	struct pfk_record *record = reader->record;

	(void)which;
	if (length != 16)
		return fail(reader, PFK_WRONG_SIZE, p);
	record->sa2_mode = p[4];
	record->sa2_reserved1 = p[5];
	record->sa2_reserved2 = get16(reader->abi, p + 6);
	record->sa2_sequence = get32(reader->abi, p + 8);
	record->sa2_reqid = get32(reader->abi, p + 12);
	return 0;
}

static int read_nat_t_type(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	(void)which;
	if (length != 8)
		return fail(reader, PFK_WRONG_SIZE, p);
	reader->record->nat_t_type = p[4];
	memcpy(reader->record->nat_t_type_reserved, p + 5, 3);
	return 0;
}

static int read_nat_t_port(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	if (length != 8)
		return fail(reader, PFK_WRONG_SIZE, p);
	reader->record->nat_t_port[which].port = get16_network(p + 4);
	reader->record->nat_t_port[which].reserved = get16(reader->abi, p + 6);
	return 0;
}

static int read_replay(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	(void)which;
	if (length != 8)
		return fail(reader, PFK_WRONG_SIZE, p);
	reader->record->replay = get32(reader->abi, p + 4);
	return 0;
}

/* Two sockaddrs of one family, packed, and what follows them; the length of one, or 0 and a fault. */
static size_t sockaddr_pair(struct reader *reader, const uint8_t *p, size_t length)
{
	uint8_t first, second;
	size_t size = sockaddr_length(reader, p, length, &first);

	if (size == 0 || sockaddr_length(reader, p + size, length - size, &second) == 0)
		return 0;
	if (first != second) {
		fail(reader, PFK_FAMILIES, p + size);
		return 0;
	}
	return size;
}

/*
 * Request lengths are in bytes on every system, whatever the headers say.  Behind the head of a request there is nothing,
 * or a pair of sockaddrs and padding, of which kernels accept any amount.
 */
static int check_requests(struct reader *reader, const uint8_t *p, size_t length)
{
	size_t head = reader->abi->request_size;

	/* Linux 6.1 ignores what is left when it is shorter than a request, and echoes it. */
	while (length >= head) {
		size_t size = get16(reader->abi, p);

		if (size < head)
			return fail(reader, PFK_REQUEST_TOO_SHORT, p);
		if (size > length)
			return fail(reader, PFK_REQUEST_PAST_END, p);
		if (size > head && sockaddr_pair(reader, p + head, size - head) == 0)
			return (int)reader->fault->reason;
		p += size;
		length -= size;
	}
	return 0;
}

static int read_policy(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	struct pfk_record *record = reader->record;

	(void)which;
	if (length < 16)
		return fail(reader, PFK_WRONG_SIZE, p);
	record->policy_type = get16(reader->abi, p + 4);
	record->policy_direction = p[6];
	record->policy_scope = p[7];
	record->policy_id = get32(reader->abi, p + 8);
	record->policy_priority = get32(reader->abi, p + 12);
	record->policy_requests = part(reader, p + 16, length - 16);
	return check_requests(reader, p + 16, length - 16);
}

/* What is rare is only checked. */

static int check_address(struct reader *reader, const uint8_t *p, size_t length, int which)
{
	struct pfk_address address;

	(void)which;
	return parse_address(reader, p, length, &address);
}

/* An extension of one size. */
static int check_size(struct reader *reader, const uint8_t *p, size_t length, int size)
{
	return length == (size_t)size ? 0 : fail(reader, PFK_WRONG_SIZE, p);
}

/* An extension that has a head of one size and anything behind it. */
static int check_head(struct reader *reader, const uint8_t *p, size_t length, int size)
{
	return length >= (size_t)size ? 0 : fail(reader, PFK_WRONG_SIZE, p);
}

static int check_sensitivity(struct reader *reader, const uint8_t *p, size_t length, int head)
{
	if (check_head(reader, p, length, head))
		return PFK_WRONG_SIZE;
	/* The lengths of the two bitmaps are in words. */
	return length == (size_t)head + PFK_WORD * ((size_t)p[9] + p[11]) ? 0 : fail(reader, PFK_BAD_COUNT, p + 9);
}

static int check_proposal(struct reader *reader, const uint8_t *p, size_t length, int head)
{
	return (length - (size_t)head) % PFK_COMBINATION == 0 ? 0 : fail(reader, PFK_WRONG_SIZE, p);
}

static int check_sec_ctx(struct reader *reader, const uint8_t *p, size_t length, int head)
{
	size_t context = get16(reader->abi, p + 6);

	return length == ((size_t)head + context + 7) / PFK_WORD * PFK_WORD ? 0 : fail(reader, PFK_BAD_COUNT, p + 6);
}

static int check_kmaddress(struct reader *reader, const uint8_t *p, size_t length, int head)
{
	size_t size = sockaddr_pair(reader, p + head, length - (size_t)head);

	if (size == 0)
		return (int)reader->fault->reason;
	return length == ((size_t)head + 2 * size + 7) / PFK_WORD * PFK_WORD ? 0 : fail(reader, PFK_WRONG_SIZE, p);
}

static int check_filter(struct reader *reader, const uint8_t *p, size_t length, int size)
{
	unsigned family, bits;

	if (check_size(reader, p, length, size))
		return PFK_WRONG_SIZE;
	family = get16(reader->abi, p + 36);
	if (family != reader->abi->af_inet && family != reader->abi->af_inet6)
		return fail(reader, PFK_BAD_FAMILY, p + 36);
	bits = family == reader->abi->af_inet ? 32 : 128;
	if (p[38] > bits || p[39] > bits)
		return fail(reader, PFK_BAD_PREFIX, p + (p[38] > bits ? 38 : 39));
	return 0;
}

static int check_sastat(struct reader *reader, const uint8_t *p, size_t length, int head)
{
	if (check_head(reader, p, length, head))
		return PFK_WRONG_SIZE;
	return length - (size_t)head == (uint64_t)get32(reader->abi, p + 12) * PFK_SASTAT_ENTRY
		       ? 0 : fail(reader, PFK_BAD_COUNT, p + 12);
}

/* One reader for each slot; `which` is its place among several alike, or a size in bytes. */
static const struct {
	int (*read)(struct reader *reader, const uint8_t *p, size_t length, int which);
	int which;
} readers[PFK_SLOTS] = {
	[PFK_SA] = { read_sa, 0 },
	[PFK_LIFETIME_CURRENT] = { read_lifetime, 0 },
	[PFK_LIFETIME_HARD] = { read_lifetime, 1 },
	[PFK_LIFETIME_SOFT] = { read_lifetime, 2 },
	[PFK_ADDRESS_SRC] = { read_address, 0 },
	[PFK_ADDRESS_DST] = { read_address, 1 },
	[PFK_KEY_AUTH] = { read_key, 0 },
	[PFK_KEY_ENCRYPT] = { read_key, 1 },
	[PFK_SPIRANGE] = { read_spirange, 0 },
	[PFK_SUPPORTED_AUTH] = { read_supported, 0 },
	[PFK_SUPPORTED_ENCRYPT] = { read_supported, 1 },
	[PFK_SA2] = { read_sa2, 0 },
	[PFK_NAT_T_TYPE] = { read_nat_t_type, 0 },
	[PFK_NAT_T_SPORT] = { read_nat_t_port, 0 },
	[PFK_NAT_T_DPORT] = { read_nat_t_port, 1 },
	[PFK_POLICY] = { read_policy, 0 },
	[PFK_SA_REPLAY] = { read_replay, 0 },
	[PFK_CHECK_ADDRESS] = { check_address, 0 },
	[PFK_CHECK_LIFETIME] = { check_size, 32 },
	[PFK_CHECK_WORD] = { check_size, 8 },
	[PFK_CHECK_IDENTITY] = { check_head, 16 },
	[PFK_CHECK_SENSITIVITY] = { check_sensitivity, 16 },
	[PFK_CHECK_PROPOSAL] = { check_proposal, 8 },
	[PFK_CHECK_SEC_CTX] = { check_sec_ctx, 8 },
	[PFK_CHECK_KMADDRESS] = { check_kmaddress, 8 },
	[PFK_CHECK_FILTER] = { check_filter, 40 },
	[PFK_CHECK_OFFLOAD] = { check_size, 40 },
	[PFK_CHECK_SESSION_ID] = { check_size, 24 },
	[PFK_CHECK_SASTAT] = { check_sastat, 16 },
};

static int seen_before(const struct reader *reader, uint64_t *known, unsigned type)
{
	const struct pfk_record *record = reader->record;
	uint64_t bit;

	if (type < PFK_EXTENSION_NUMBERS) {
		bit = (uint64_t)1 << type;
		if (*known & bit)
			return 1;
		*known |= bit;
		return 0;
	}
	for (unsigned i = 0; i < record->count; i++)
		if (get16(reader->abi, reader->start + PFK_WORD * record->offset[i] + 2) == type)
			return 1;
	return 0;
}

static int read_extension(struct reader *reader, const uint8_t *p, size_t length, unsigned type)
{
	struct pfk_record *record = reader->record;
	unsigned slot = type < PFK_EXTENSION_NUMBERS ? reader->abi->slot[type] : PFK_RAW;
	int reason;

	if (slot == PFK_RAW || slot >= PFK_SLOTS)
		return 0;
	reason = readers[slot].read(reader, p, length, readers[slot].which);
	if (reason == 0) {
		record->valid |= (uint64_t)1 << (record->count - 1);
		if (slot < PFK_CHECK_ADDRESS)
			record->present |= (uint32_t)1 << slot;
	}
	/* An echo of what was rejected may hold anything: it is kept as it is. */
	return record->error ? 0 : reason;
}

static int read_extensions(struct reader *reader, size_t length)
{
	struct pfk_record *record = reader->record;
	const uint8_t *p = reader->start + PFK_HEADER, *end = reader->start + length;
	uint64_t known = 0;

	while (p < end) {
		size_t size = (size_t)get16(reader->abi, p) * PFK_WORD;
		unsigned type = get16(reader->abi, p + 2);
		int reason;

		reader->fault->extension = type;
		if (size == 0)
			return fail(reader, PFK_LENGTH_ZERO, p);
		if (size > (size_t)(end - p))
			return fail(reader, PFK_PAST_END, p);
		if (type == 0)
			return fail(reader, PFK_TYPE_ZERO, p + 2);
		if (record->count == PFK_MAX_EXTENSIONS)
			return fail(reader, PFK_TOO_MANY, p);
		if (seen_before(reader, &known, type))
			return fail(reader, PFK_DUPLICATE, p + 2);
		record->offset[record->count++] = (uint16_t)((size_t)(p - reader->start) / PFK_WORD);
		reason = read_extension(reader, p, size, type);
		if (reason)
			return reason;
		p += size;
	}
	return 0;
}

static int read_header(struct reader *reader, const uint8_t *p, size_t length)
{
	struct pfk_record *record = reader->record;

	if (length < PFK_HEADER)
		return fail(reader, PFK_SHORT_HEADER, p + length);
	record->version = p[0];
	record->type = p[1];
	record->error = p[2];
	record->satype = p[3];
	record->length = get16(reader->abi, p + 4);
	record->reserved = get16(reader->abi, p + 6);
	record->seq = get32(reader->abi, p + 8);
	record->pid = get32(reader->abi, p + 12);
	if (record->version != 2)
		return fail(reader, PFK_BAD_VERSION, p);
	if (length % PFK_WORD)
		return fail(reader, PFK_NOT_WORDS, p + length / PFK_WORD * PFK_WORD);
	if (length / PFK_WORD > UINT16_MAX)
		return fail(reader, PFK_TOO_LONG, p);
	if (record->length < PFK_HEADER / PFK_WORD)
		return fail(reader, PFK_STATED_TOO_SHORT, p + 4);
	record->words = (uint16_t)(length / PFK_WORD);
	return 0;
}

/*
 * How many bytes more than it sends Linux 6.1 states, 0 where it does not: its count gives back room for the two addresses
 * that a transport template does not have, of the size of those of the tunnel before it, where it had counted two of
 * the size of the selector's own (af_key.c, pfkey_xfrm_policy2msg_size).
 */
static size_t overcount(const struct reader *reader)
{
	const struct pfk_record *record = reader->record;
	const uint8_t *p = reader->start + record->policy_requests.offset;
	size_t head = reader->abi->request_size, left = record->policy_requests.length, allotted, returned;
	size_t own = record->address[0].version == 4 ? PFK_SOCKADDR_IN : PFK_SOCKADDR_IN6, last = own;

	if (!(record->present >> PFK_POLICY & record->present >> PFK_ADDRESS_SRC & 1))
		return 0;
	for (allotted = returned = 0; left >= head; ) {
		size_t size = get16(reader->abi, p);

		if (size > head) {
			last = ip_version(reader->abi, p + head) == 4 ? PFK_SOCKADDR_IN : PFK_SOCKADDR_IN6;
		} else {
			allotted += 2 * own;
			returned += 2 * last;
		}
		p += size;
		left -= size;
	}
	return allotted > returned ? allotted - returned : 0;
}

/* A promiscuous socket gets other messages wrapped in a header of this type: what follows is no list of extensions. */
#define SADB_X_PROMISC 11

int pfk_decode(const struct pfk_abi *abi, const uint8_t *data, size_t length, struct pfk_record *record,
	       struct pfk_fault *fault)
{
	struct reader reader = { abi, data, record, fault };
	int reason;

	memset(record, 0, sizeof *record);
	memset(fault, 0, sizeof *fault);
	reason = read_header(&reader, data, length);
	if (reason)
		return reason;
	if (record->type != SADB_X_PROMISC)
		reason = read_extensions(&reader, length);
	else
		record->body = part(&reader, data + PFK_HEADER, length - PFK_HEADER);
	if (record->length <= record->words)
		return reason;
	/* What the header promises is not here: that says more than what the cut did to an extension. */
	if (reason == 0 && record->length * PFK_WORD == length + overcount(&reader))
		return 0;
	fault->extension = 0;
	return fail(&reader, PFK_TRUNCATED, data + 4);
}

int pfk_decode_many(const struct pfk_abi *abi, const uint8_t *arena, const uint32_t *lengths, size_t count,
		    struct pfk_record *records, struct pfk_fault *fault)
{
	for (size_t i = 0; i < count; i++) {
		int reason = pfk_decode(abi, arena, lengths[i], &records[i], fault);

		if (reason) {
			fault->index = (uint32_t)i;
			return reason;
		}
		arena += lengths[i];
	}
	return 0;
}

int pfk_decode_marked(const struct pfk_abi *abi, const uint8_t *arena, size_t size, const uint8_t *mark, size_t count,
		      uint32_t *lengths, struct pfk_record *records, struct pfk_fault *fault)
{
	const uint8_t *p = arena, *end = arena + size;

	for (size_t i = 0; i < count; i++) {
		size_t length;

		if (i > 0) {
			if ((size_t)(end - p) < PFK_MARK || memcmp(p, mark, PFK_MARK) != 0)
				return -1;
			p += PFK_MARK;
		}
		if ((size_t)(end - p) < PFK_HEADER)
			return -1;
		length = get16(abi, p + 4) * (size_t)PFK_WORD;
		if (length > (size_t)(end - p) || pfk_decode(abi, p, length, &records[i], fault))
			return -1;
		lengths[i] = (uint32_t)length;
		p += length;
	}
	return p == end ? 0 : -1;
}
