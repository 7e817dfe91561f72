/*
 * Fuzz target: a batch says of each message what pfk_decode says of it alone, and stops at the first that is none; with
 * marks between them instead of lengths it says the same, or that it takes the lengths.
 */
#include "check.h"

#define MOST 8

static const uint8_t mark[PFK_MARK] = { 1, 0, 61, 0, 'm', 'a', 'r', 'k' };

static int holds_mark(const uint8_t *p, size_t length)
{
	for (size_t i = 0; i + PFK_MARK <= length; i++)
		if (memcmp(p + i, mark, PFK_MARK) == 0)
			return 1;
	return 0;
}

/* `reason` is what pfk_decode_many said, `records` what it found. */
static void with_marks(const struct pfk_abi *abi, const uint8_t *arena, const uint32_t *lengths, size_t count,
		       int reason, const struct pfk_record *records)
{
	static struct pfk_record again[MOST];
	struct pfk_fault fault;
	uint32_t found[MOST];
	size_t size = 0, total = 0;
	int told = reason == 0;
	uint8_t *marked;

	for (size_t i = 0; i < count; i++)
		total += lengths[i];
	marked = malloc(total + PFK_MARK * count + 1);
	REQUIRE(marked);
	for (size_t i = 0; i < count; i++) {
		if (i > 0)
			memcpy(marked + size, mark, PFK_MARK);
		size += i > 0 ? PFK_MARK : 0;
		memcpy(marked + size, arena, lengths[i]);
		size += lengths[i];
		told = told && records[i].length == records[i].words;
		if (holds_mark(arena, lengths[i])) {
			free(marked);
			return;
		}
		arena += lengths[i];
	}
	marked = realloc(marked, size ? size : 1);	/* so that a byte behind it is seen */
	REQUIRE(marked);
	REQUIRE(pfk_decode_marked(abi, marked, size, mark, count, found, again, &fault) == (told ? 0 : -1));
	if (told)
		REQUIRE(memcmp(found, lengths, count * sizeof *found) == 0 &&
			memcmp(again, records, count * sizeof *again) == 0);
	free(marked);
}

/* The byte after the Abi is the number of messages; then comes a 16-bit length for each, then the arena. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct pfk_record records[MOST], alone;
	uint32_t lengths[MOST];
	struct pfk_fault fault, first;
	const struct pfk_abi *abi;
	const uint8_t *arena;
	size_t count, left;
	int reason;

	if (size < 2)
		return 0;
	abi = abi_of(data[0]);
	count = data[1] % (MOST + 1);
	if (size < 2 + 2 * count)
		return 0;
	arena = data + 2 + 2 * count;
	left = size - 2 - 2 * count;
	for (size_t i = 0; i < count; i++) {
		size_t length = (size_t)(data[2 + 2 * i] | data[3 + 2 * i] << 8);

		lengths[i] = (uint32_t)(length < left ? length : left);
		left -= lengths[i];
	}
	reason = pfk_decode_many(abi, arena, lengths, count, records, &fault);
	REQUIRE(!reason || fault.index < count);
	for (size_t i = 0; i < (reason ? (size_t)fault.index + 1 : count); i++) {
		int single = pfk_decode(abi, arena, lengths[i], &alone, &first);

		if (reason && i == fault.index) {
			REQUIRE(single == reason && first.offset == fault.offset && first.extension == fault.extension);
		} else {
			REQUIRE(single == 0 && memcmp(&alone, &records[i], sizeof alone) == 0);
		}
		arena += lengths[i];
	}
	with_marks(abi, data + 2 + 2 * count, lengths, count, reason, records);
	return 0;
}
