/* Fuzz target: a batch says of each message what pfk_decode says of it alone, and stops at the first that is none. */
#include "check.h"

#define MOST 8

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
	return 0;
}
