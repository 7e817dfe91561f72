/* Fuzz target: any bytes, of any system, are a record or a fault. */
#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct pfk_record record;
	struct pfk_fault fault;
	int reason;

	if (size == 0)
		return 0;
	reason = pfk_decode(abi_of(data[0]), data + 1, size - 1, &record, &fault);
	if (reason)
		check_fault(&fault, reason, size - 1);
	else
		check_record(&record, size - 1);
	return 0;
}
