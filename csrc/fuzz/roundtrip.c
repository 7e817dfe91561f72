/* Fuzz target: what decodes encodes to the bytes that it came from; an encoder given any record writes no other's memory. */
#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct pfk_record record, wild;
	struct pfk_fault fault;
	const struct pfk_abi *abi;
	size_t capacity, length;
	uint8_t *out;

	if (size == 0)
		return 0;
	abi = abi_of(data[0]);
	data++;
	size--;
	capacity = size + 16 + 48 * PFK_MAX_EXTENSIONS;
	out = malloc(capacity);
	if (!out)
		return 0;
	if (pfk_decode(abi, data, size, &record, &fault) == 0) {
		length = pfk_encode(abi, (const uint8_t *)&record, data, size, out, capacity, &fault);
		REQUIRE(length == size && memcmp(out, data, size) == 0);
		/* Too little room is a fault, never a write past the end: the sanitizer sees it. */
		for (size_t less = 0; less < length; less += 24) {
			uint8_t *small = malloc(less ? less : 1);

			if (small) {
				REQUIRE(pfk_encode(abi, (const uint8_t *)&record, data, size, small, less, &fault) == 0);
				free(small);
			}
		}
	}
	/* A record that no decoder made: its parts lie anywhere. */
	memset(&wild, 0, sizeof wild);
	memcpy(&wild, data, size < sizeof wild ? size : sizeof wild);
	length = pfk_encode(abi, (const uint8_t *)&wild, data, size, out, capacity, &fault);
	REQUIRE(length <= capacity);
	free(out);
	return 0;
}
